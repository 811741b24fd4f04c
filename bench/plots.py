"""Plots of the JSON that bench/kernels.py writes: `python bench/plots.py bench/results/kernels.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

STAGES = ("append_kv", "estimate", "topk_pages", "sparse_decode")
COLOURS = ("#999999", "#56B4E9", "#E69F00", "#0072B2")  # distinct to colour-blind readers

TARGETS = 5  # the first workloads, which have targets and a plot of their own


def draw(result: dict[str, Any], json_path: Path) -> None:
    """Write NAME.png with all workloads and NAME-targets.png with the first five, beside NAME.json."""
    draw_rows(result["machine"], result["rows"], json_path.with_suffix(".png"))
    draw_rows(result["machine"], result["rows"][:TARGETS], json_path.with_name(f"{json_path.stem}-targets.png"))


def draw_rows(machine: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of each operator and of decode_step, as shares of the fastest dense attention."""
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.62 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        times = {name: t["median"] for name, t in row["microseconds"].items()}
        dense, left, first = times[row["fastest_dense"]], 0.0, y == 0
        for stage, colour in zip(STAGES, COLOURS, strict=True):
            share = times[stage] / dense
            axes.barh(y, share, 0.4, left, color=colour, label=f"{stage} alone" if first else None)
            left += share
        step, roofline = times["pipeline"] / dense, times["limit"] / dense
        axes.barh(y + 0.3, step, 0.16, color="black", label="decode_step" if first else None)
        axes.plot([roofline] * 2, [y - 0.24, y + 0.4], color="#009E73", lw=2, label="read roofline" if first else None)
        text = f"{times['pipeline']:.0f} of {dense:.0f} us ({row['fastest_dense']}): {row['speedup']:.1f}x"
        axes.annotate(text, (min(max(left, step), 1.4), y), (6, -6), textcoords="offset points")
    axes.axvline(1, color="#D55E00", label="fastest dense")
    axes.set_yticks(range(len(rows)), [row["workload"]["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.8)
    axes.set_xlabel("time of a layer and step, fastest dense attention = 1")
    axes.set_title(f"Decode attention on {machine['gpu']}, torch {machine['torch']}: query/KV heads, context, budget")
    figure.legend(loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
