"""Compare selections on two models: loss and facts found against bytes read.

    python bench/selection_study.py [SUITE ...] [--device cuda] [--out results/selection] [--processes 12]
    python bench/selection_study.py --plot docs/images/selection-frontier.png

A suite is one or more tasks of `quest-eval run` with their policies. Each policy runs in a process of its own,
`--processes` at a time. A second call goes on where the first stopped. The results of a suite are in
OUT/SUITE/results.json. SmolLM2 comes from `make eval-model`. bench/results/evaluation/selection-*.json has the
documentation's figures, which `--plot` draws.
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


#: The selections of the documentation's tables, with their policies.
CHOICES = {
    "dense": "dense",
    "earlier default: min and max, 8 bits": "quest-int8",
    "the same, first page forced": "quest-int8,sink_pages=1",
    "**default: mean ± std, 4 bits, first page forced**": "quest-default",
    "default, 8 bits": "quest-default,bounds=int8",
    "default, first page not forced": "quest-default,sink_pages=0",
    "default, pages of 8": "quest-default,page_size=8",
    "default, pages of 8, 8 bits": "quest-default,page_size=8,bounds=int8",
    "default, pages of 32": "quest-default,page_size=32",
    "default, `soft`": "quest-default,group_reduce=soft",
    "default, a list for each query head": "quest-default,group_reduce=none",
    "default, two dense layers": "quest-default,dense_layers=2",
    "two stages, 4 bits": "two-stage,bits=4",
    "two stages, 4 bits, pages of 8": "two-stage,page_size=8,bits=4,rerank=lse",
    "page oracle, for each query head": "page-oracle",
}
#: Those of the picture, with their colours and markers.
DRAWN = {
    "quest-int8": ("earlier default", "#777777", "o"),
    "quest-default": ("default", "#0072B2", "o"),
    "quest-default,sink_pages=0": ("default, first page not forced", "#D55E00", "v"),
    "quest-default,page_size=8": ("default, pages of 8", "#56B4E9", "s"),
    "quest-default,page_size=32": ("default, pages of 32", "#CC79A7", "^"),
    "quest-default,group_reduce=none": ("default, a list for each query head", "#8B6914", "P"),
    "two-stage,bits=4": ("two stages, 4 bits", "#009E73", "D"),
    "two-stage,page_size=8,bits=4,rerank=lse": ("two stages, 4 bits, pages of 8", "#E69F00", "*"),
    "page-oracle": ("page oracle, for each query head", "black", "x"),
}
RESULTS = Path(__file__).parent / "results" / "evaluation"


@dataclass(frozen=True)
class Suite:
    """Tasks of `quest-eval run` with their options, and the budgets of the policies."""

    options: tuple[str, ...]
    policies: dict[str, tuple[int, ...]]


def _budgets(policies: tuple[str, ...], *budgets: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(policies, budgets)


_ALL = (*ONE_STAGE, *TWO_STAGES, "page-oracle")
_SMOLLM2 = ("--model", "smollm2", "--dense-layers", "0")
_LOSS = ("loss", *_SMOLLM2, "--lengths", "7936", "--tries", "10", "--scored", "128")
SUITES = {
    # The second selection by the operators.
    "candidates": Suite(
        _LOSS,
        _budgets(("quest-default", "quest-default,candidates=2048"), 256, 512, 1024),
    ),
    # Selections kept for several steps, on SmolLM2 and on the bundled model.
    "reselect": Suite(
        _LOSS,
        _budgets(("quest-default",), 512, 1024, 2048)
        | _budgets(("quest-default,reselect_every=2", "quest-default,reselect_every=4"), 512, 1024, 1536, 1792, 2048)
        | _budgets(
            (
                "quest-int8",
                "quest-default,reselect_every=3",
                "quest-default,reselect_every=8",
                "quest-default,recent_pages=2",
                "quest-default,reselect_every=3,recent_pages=2",
                "quest-default,reselect_every=4,recent_pages=2",
            ),
            1024,
            2048,
        ),
    ),
    "reselect-bundled": Suite(
        ("needles", "perplexity", "--lengths", "32768", "--tries", "10", "--scored", "128", "--dense-layers", "2"),
        _budgets(
            (
                "quest-default",
                "quest-default,reselect_every=4",
                "quest-default,reselect_every=4,recent_pages=2",
            ),
            1024,
            2048,
        ),
    ),
    "loss": Suite(
        _LOSS,
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
        *("--policies", "dense", policy, "--budgets", *budgets),
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
            cells.setdefault((cell["task"], cell["policy"], cell["budget"]), cell)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(
        json.dumps({"settings": settings, "cells": list(cells.values())}, indent=1) + "\n"
    )


def plot(path: Path) -> None:
    """Loss over dense and facts found against the bytes read: a line for each selection, a point for each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, suite in zip(panels, ("loss", "facts"), strict=True):
        cells = json.loads((RESULTS / f"selection-{suite}.json").read_text())["cells"]
        for policy, (label, colour, marker) in DRAWN.items():
            points = [
                (100 * cell["kv_bytes_read"] / cell["kv_bytes_dense"], cell["value"], cell["budget"])
                for cell in cells
                if cell["policy"] == policy
            ]
            x, y, _ = zip(*sorted(points, key=lambda point: point[2]), strict=True)
            y = [value - 1 for value in y] if suite == "loss" else list(y)
            width = 2.2 if policy == "quest-default" else 1.2
            axes.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=width, label=label)
        axes.set_xscale("log")
        ticks = (4, 6, 8, 10, 15, 20, 30, 50, 80)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("keys, values and summaries read, % of dense")
        axes.grid(alpha=0.3)
    loss, facts = panels
    loss.set_yscale("log")
    loss.set_yticks(levels := (0.003, 0.01, 0.03, 0.1, 0.3, 1, 2), [f"{1 + level:g}" for level in levels])
    loss.minorticks_off()
    loss.set_title("Loss over dense, ten texts of 7,936 tokens; budgets 256 to 2,048", loc="left", fontsize=10)
    dense = next(cell["value"] for cell in cells if cell["policy"] == "dense")
    facts.axhline(dense, color="black", linestyle="--", label="dense")
    facts.set_ylim(0)
    facts.set_title("Facts found of 100, 4,096 tokens; budgets 128 to 1,024", loc="left", fontsize=10)
    figure.legend(*facts.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("suites", nargs="*", default=list(SUITES), metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/selection"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the committed results, and run nothing")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot)
        return
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
