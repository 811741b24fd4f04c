"""What all pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vP*X"
DENSE = {"color": "black", "linestyle": "--", "linewidth": 1.5}
ORACLE = {"color": "black", "linestyle": ":", "linewidth": 1.5}


def pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def line(policy: str, others: list[str]) -> dict[str, Any]:
    """How a policy is drawn: dense and oracles as lines to compare with."""
    if policy == "dense":
        return DENSE
    if policy.endswith("-oracle"):
        return ORACLE | {"marker": MARKERS[policy != "page-oracle"], "markersize": 3}
    i = others.index(policy)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
