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

    ``value`` is the mean score, or the perplexity: the exponential of the mean loss in nats a token. ``error`` is its
    standard error over the tries (0 for one). "perplexity over dense" is the exponential of the mean difference to
    dense on the same texts. Texts that dense has not scored are left out. ``genres`` has that of each genre, and
    ``perplexity`` the perplexity itself. ``depths`` has the mean score and number of tries at each depth, ``curve`` the
    perplexity at each position.
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
        genres = [sample["genre"] for sample in samples.values()]
        losses = [sample["score"] for sample in samples.values()]
        over, whole = (_grouped(zip(genres, of, strict=True)) for of in (scores, losses))
        cell["genres"] = {name: math.exp(fmean(found)) for name, found in over}
        cell["perplexity"] = {"all": math.exp(fmean(losses))} | {name: math.exp(fmean(found)) for name, found in whole}
    cell["curve"] = [(position, math.exp(fmean(found))) for position, found in places]
    return cell


def _losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {sample["index"]: sample["score"] for record in records for sample in record["samples"]}


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return sorted(groups.items())
