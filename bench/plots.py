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
COLOURS = ("#999999", "#56B4E9", "#E69F00", "#0072B2")  # told apart by colour-blind readers


def draw(result: dict[str, Any], json_path: Path) -> None:
    """Latency by stage against dense attention and the limit, a bar group a workload."""
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.62 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        times = {name: t["median"] for name, t in row["microseconds"].items()}
        left = 0.0
        for stage, colour in zip(STAGES, COLOURS, strict=True):
            axes.barh(y, times[stage], 0.36, left, color=colour, label=stage if y == 0 else None)
            left += times[stage]
        pipeline, limit = times["pipeline"], times["limit"]
        axes.barh(y + 0.26, pipeline, 0.12, color="black", label="pipeline, one graph" if y == 0 else None)
        axes.barh(
            y + 0.4, times[row["fastest_dense"]], 0.12, color="#D55E00", label="fastest dense" if y == 0 else None
        )
        axes.plot(
            [limit, limit], [y - 0.2, y + 0.33], color="#009E73", lw=2, label="limit: reading" if y == 0 else None
        )
        axes.annotate(
            f"{row['speedup']:.1f}x", (times[row["fastest_dense"]], y + 0.4), (4, -3), textcoords="offset points"
        )
    axes.set_yticks(range(len(rows)), [row["workload"]["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds a layer and step (log scale)")
    machine = result["machine"]
    axes.set_title(f"Decode attention on {machine['gpu']}, torch {machine['torch']}: query/KV heads, context, budget")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(json_path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
