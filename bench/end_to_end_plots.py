"""Plots of the JSON that bench/end_to_end.py writes: `python bench/end_to_end_plots.py bench/results/NAME.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from end_to_end_tables import KEPT

mpl.use("Agg")
import matplotlib.pyplot as plt

# Distinct to colour-blind readers.
COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#0072B2", "#999999")
STAGES = ("matrix products", "sparse layers", "dense layers", "other kernels", "gaps")
LAST_COLOUR = "#8B6914"  # of KEPT, which is drawn besides the first choices
STAGED = (32768, 131072)  # contexts in the plot of stages
Rows = list[dict[str, Any]]


def draw(result: dict[str, Any], json_path: Path) -> None:
    """Write NAME.png, time against context, and NAME-stages.png, time by stage, beside NAME.json."""
    gpu = result["machine"].get("gpu", "one CPU core")
    models: dict[str, Rows] = {}
    for row in result["rows"]:
        models.setdefault(f"{row['shape']['name']}, {row['weights']}, batch {row['batch']}", []).append(row)
    draw_contexts(models, f"milliseconds a step on {gpu}", json_path.with_suffix(".png"))
    staged = [row for row in result["rows"] if "stages" in row["dense"][row["fastest_dense"]]]
    if staged := [row for row in staged if row["context"] in STAGED]:
        draw_stages(staged, f"a step by stage on {gpu}", json_path.with_name(f"{json_path.stem}-stages.png"))


def milliseconds(entry: dict[str, Any]) -> float:
    return float(entry["milliseconds"]["median"])


def draw_contexts(models: dict[str, Rows], title: str, path: Path) -> None:
    """A plot for each model, weights and batch: a line for dense attention and for each of Quest's configurations."""
    columns = min(4, len(models))
    lines = -(-len(models) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines + 0.8), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axes in grid.flat[len(models) :]:
        axes.set_axis_off()
    for (name, rows), axes in zip(models.items(), grid.flat, strict=False):
        rows = sorted(rows, key=lambda row: row["context"])
        contexts = [row["context"] for row in rows]
        dense = [milliseconds(row["dense"][row["fastest_dense"]]) for row in rows]
        handles["fastest dense"] = axes.plot(contexts, dense, "o-", color="#D55E00", label="fastest dense")[0]
        drawn = dict(zip(rows[0]["quest"], COLOURS, strict=False))
        if KEPT in rows[0]["quest"]:
            drawn[KEPT] = LAST_COLOUR
        for choice, colour in drawn.items():
            times = [milliseconds(row["quest"][choice]) if choice in row["quest"] else None for row in rows]
            style = "s--" if choice.startswith("paper") else ".-"
            label = f"Quest, {choice}"
            handles[label] = axes.plot(contexts, times, style, color=colour, label=label)[0]
        rest = [milliseconds(row["without_attention"]) for row in rows]
        handles["without attention"] = axes.plot(contexts, rest, ":", color="black", label="without attention")[0]
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context >> 10}K" for context in contexts])
        axes.set_ylim(0)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("ms a step")
        axes.set_title(name, fontsize=10)
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_stages(rows: Rows, title: str, path: Path) -> None:
    """Stacked bars of each row: dense attention, then Quest's configurations that have stages."""
    bars: list[tuple[float, str, dict[str, Any]]] = []
    for row in rows:
        entries = {row["fastest_dense"]: row["dense"][row["fastest_dense"]]}
        entries |= {f"Quest, {name}": entry for name, entry in row["quest"].items()}
        top = bars[-1][0] + 1.6 if bars else 0.0
        names = [name for name, entry in entries.items() if "stages" in entry and not name.endswith("full")]
        bars += [(top + i, f"{row['name']}: {name}", entries[name]) for i, name in enumerate(names)]
    figure, axes = plt.subplots(figsize=(11, 1.4 + 0.2 * bars[-1][0]), layout="constrained")
    for y, _, entry in bars:
        left = 0.0
        for stage, colour in zip(STAGES, COLOURS, strict=False):
            axes.barh(y, entry["stages"][stage], 0.8, left, color=colour, label=None if y else stage)
            left += entry["stages"][stage]
        axes.annotate(f"{left:.2f} ms", (left, y), (4, -3), textcoords="offset points", fontsize=7)
    axes.set_yticks([y for y, _, _ in bars], [name for _, name, _ in bars], fontsize=7)
    axes.set_ylim(bars[-1][0] + 0.6, -0.6)
    axes.margins(x=0.1)
    axes.set_xlabel("ms a step")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
