"""Cells, each the mean over the tries of a task, length, policy and budget: from a journal, to and from files."""

from __future__ import annotations

import csv
import json
import math
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Cell = dict[str, Any]
_USAGE = ("tokens_attended", "kv_bytes_read", "kv_bytes_held", "kv_bytes_dense")
_COLUMNS = ("task", "length", "policy", "label", "budget", "metric", "value", "error", "tries", *_USAGE, "seconds")


def cells(records: list[dict[str, Any]]) -> list[Cell]:
    """A cell for each task, length, policy and budget, in the order in which they were first run.

    ``value`` is the mean score, or the perplexity: the exponential of the mean loss in nats a token. "perplexity over
    dense" is the exponential of the mean of the differences to dense on the same texts, and leaves out texts that dense
    has not scored. ``error`` is its standard error over the tries (0 for one). ``genres`` has the values of single
    genres, ``perplexity`` the perplexity itself, of all texts and of each genre's. ``depths`` has the mean score and number of tries at each depth,
    ``curve`` the perplexity at each position.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["task"], record["length"], record["policy"], record["budget"])
        groups.setdefault(key, []).append(record)
    dense = {key[:2]: _losses(group) for key, group in groups.items() if key[2] == "dense"}
    return [_cell(group, dense.get(key[:2], {})) for key, group in groups.items()]


def write(folder: Path, settings: dict[str, Any], found: list[Cell]) -> None:
    """Write ``results.json``, settings and cells, and ``results.csv``, a line a cell."""
    (folder / "results.json").write_text(json.dumps({"settings": settings, "cells": found}, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)


def read(path: Path) -> list[Cell]:
    """The cells of a ``results.json``."""
    found: list[Cell] = json.loads(path.read_text())["cells"]
    return found


def _cell(records: list[dict[str, Any]], dense: dict[int, float]) -> Cell:
    # A batch that was run again replaces its earlier record.
    samples = {sample["index"]: sample for record in records for sample in record["samples"]}
    first = records[0]
    relative = first["metric"] == "perplexity over dense"
    if relative:
        samples = {index: sample for index, sample in samples.items() if index in dense}
    shift = dense if relative else {}
    scores = [sample["score"] - shift.get(index, 0.0) for index, sample in samples.items()]
    value, error = fmean(scores), stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    if first["metric"].startswith("perplexity"):
        value = math.exp(value)
        error *= value
    cell = {name: first[name] for name in ("task", "metric", "length", "policy", "label", "budget")}
    cell |= {"value": value, "error": error, "tries": len(scores)}
    cell |= {name: fmean(record["usage"][name] for record in records) for name in _USAGE}
    cell["seconds"] = sum(record["seconds"] for record in records)
    depths = _grouped([(s["depth"], s["score"]) for s in samples.values() if s.get("depth") is not None])
    places = _grouped([(position, loss) for s in samples.values() for position, loss in s.get("curve", [])])
    cell["depths"] = [(depth, fmean(found), len(found)) for depth, found in depths]
    if relative:
        genres = _grouped(
            [(sample["genre"], (loss, sample["score"])) for loss, sample in zip(scores, samples.values(), strict=True)]
        )
        over, whole = ({name: math.exp(fmean(pair[i] for pair in found)) for name, found in genres} for i in (0, 1))
        cell |= {"genres": over, "perplexity": {"all": math.exp(fmean(s["score"] for s in samples.values()))} | whole}
    cell["curve"] = [(position, math.exp(fmean(found))) for position, found in places]
    return cell


def _losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {sample["index"]: sample["score"] for record in records for sample in record["samples"]}


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return sorted(groups.items())
