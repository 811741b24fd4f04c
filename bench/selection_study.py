"""Compare page summaries and a second stage of selection on two models: loss and facts found against bytes read.

    python bench/selection_study.py [SUITE ...] [--device cuda] [--out results/selection] [--processes 12]

A suite is a task of `quest-eval run` with its policies. Each policy runs in a process of its own, `--processes` at a
time. A second call goes on where the first stopped. The results of a suite are in OUT/SUITE/results.json. SmolLM2 comes
from `make eval-model`. Figures of the documentation: bench/results/evaluation/selection-*.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ONE_STAGE = (
    "quest-int8",
    "quest-int8,sink_pages=1",
    "quest-default",
    "quest-default,bounds=int8",
    "quest-default,sink_pages=0",
    "quest-default,page_size=8",
    "quest-default,page_size=8,bounds=int8",
    "quest-default,page_size=32",
    "quest-default,group_reduce=soft",
    "quest-default,group_reduce=none",
    "summary,summary=mean_var",
)
TWO_STAGES = (
    "two-stage",
    "two-stage,rerank=lse",
    "two-stage,bits=4",
    "two-stage,keep=0.125,rerank=lse",
    "two-stage,code_bits=1",
    "two-stage,page_size=8,bits=4",
    "two-stage,page_size=8,bits=4,rerank=lse",
)


@dataclass(frozen=True)
class Suite:
    """A task of `quest-eval run` with its options, and the budgets of its policies."""

    options: tuple[str, ...]
    policies: dict[str, tuple[int, ...]]


def _budgets(policies: tuple[str, ...], *budgets: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(policies, budgets)


_ALL = (*ONE_STAGE, *TWO_STAGES, "page-oracle")
_SMOLLM2 = ("--model", "smollm2", "--dense-layers", "0")
SUITES = {
    "loss": Suite(
        ("loss", *_SMOLLM2, "--lengths", "7936", "--tries", "10", "--scored", "128"),
        _budgets((*_ALL, "quest-default,dense_layers=2"), 256, 512, 1024, 2048),
    ),
    "facts": Suite(
        ("facts", *_SMOLLM2, "--lengths", "4096", "--tries", "100", "--batch", "25"),
        _budgets(ONE_STAGE, 128, 256, 512, 1024) | _budgets((*TWO_STAGES, "page-oracle"), 128, 256, 512),
    ),
    "needles": Suite(
        ("needles", "--lengths", "32768", "--tries", "10", "--dense-layers", "2"),
        _budgets(_ALL, 256, 512, 1024, 2048),
    ),
    "perplexity": Suite(
        ("perplexity", "--lengths", "32768", "--tries", "16", "--scored", "128", "--dense-layers", "2"),
        _budgets(_ALL, 256, 512, 1024, 2048),
    ),
}


def command(suite: Suite, policy: str, device: str, out: Path) -> list[str]:
    budgets = map(str, suite.policies[policy])
    return [
        *(sys.executable, "-m", "quest_eval", "run", *suite.options, "--device", device, "--out", str(out)),
        *("--policies", "dense", policy, "--budgets", *budgets, "--prefills", "0"),
    ]


def merge(folders: list[Path], out: Path) -> None:
    """One results.json of a suite's policies. Dense is the same in each."""
    cells, settings = {}, None
    for folder in folders:
        if not (path := folder / "results.json").is_file():
            continue
        result = json.loads(path.read_text())
        settings = settings or result["settings"]
        for cell in result["cells"]:
            cell.pop("curve", None)
            cells.setdefault((cell["policy"], cell["budget"]), cell)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps({"settings": settings, "cells": list(cells.values())}, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("suites", nargs="*", default=list(SUITES), metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/selection"))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if unknown := set(options.suites) - SUITES.keys():
        parser.error(f"SUITE must be of {', '.join(SUITES)}, got {' '.join(sorted(unknown))}")
    folders = {name: {p: options.out / name / p for p in SUITES[name].policies} for name in options.suites}

    def run(name: str, policy: str) -> None:
        folder = folders[name][policy]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            line = command(SUITES[name], policy, options.device, folder)
            status = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        merge(list(folders[name].values()), options.out / name)
        print(f"{name}: {policy}" + (f" ended with {status}, see {folder}/log.txt" if status else ""), flush=True)

    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(lambda work: run(*work), [(name, policy) for name in folders for policy in folders[name]]))


if __name__ == "__main__":
    main()
