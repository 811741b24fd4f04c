"""What all pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

#: A colour and a marker for each policy, the same in every picture; rivals and Quest's variants never share a panel.
_STYLES = {
    "quest": ("#0072B2", "o"),
    "quest-head": ("#009E73", "s"),
    "quest-sum": ("#E69F00", "^"),
    "quest-soft": ("#D55E00", "v"),
    "quest-shared": ("#777777", "X"),
    "quest-meanstd": ("#CC79A7", "D"),
    "quest-int8": ("#56B4E9", "*"),
    "quest-nodense": ("#8B6914", "P"),
    "h2o": ("#D55E00", "s"),
    "tova": ("#E69F00", "^"),
    "streaming": ("#CC79A7", "v"),
    "snapkv": ("#009E73", "D"),
    "sparq": ("#777777", "X"),
}
_DENSE = {"color": "black", "linestyle": "--", "linewidth": 1.5}
_ORACLE = {"color": "black", "linestyle": ":", "linewidth": 1.5, "markersize": 3}


def pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def is_frame(policy: str) -> bool:
    """Whether a policy is there to compare others with."""
    return policy == "dense" or policy.endswith("-oracle")


def line(policy: str) -> dict[str, Any]:
    """How a policy is drawn."""
    if policy == "dense":
        return _DENSE
    if is_frame(policy):
        return _ORACLE | {"marker": "o" if policy == "page-oracle" else "s"}
    colour, marker = _STYLES.get(policy, ("#999999", "."))
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2.2 if policy == "quest" else 1.3}


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
