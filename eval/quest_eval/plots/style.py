"""Figures, and a colour and marker for each policy that is the same in every plot."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

#: Rivals and Quest's variants never share a panel, so they share colours.
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
    "window": ("#8B6914", "P"),
    "snapkv": ("#009E73", "D"),
    "sparq": ("#777777", "X"),
}
#: For policies of one's own, by a hash of their name.
_OTHERS = (("#332288", "h"), ("#882255", "<"), ("#117733", ">"), ("#44AA99", "p"))
_DENSE = {"color": "black", "linestyle": "--", "linewidth": 1.5}
_ORACLE = {"color": "black", "linestyle": ":", "linewidth": 1.5, "markersize": 3}


def new_figure(width: float, height: float) -> Any:
    """A figure of that many inches. It belongs to no window, so no backend is chosen and none has to be closed."""
    return Figure(figsize=(width, height), layout="constrained")


def is_reference(policy: str) -> bool:
    """Whether a policy is a limit that others are compared with: dense attention and the oracles."""
    return policy == "dense" or policy.endswith("-oracle")


def line(policy: str) -> dict[str, Any]:
    """The style of a policy's line, as keywords of matplotlib."""
    if policy == "dense":
        return _DENSE
    if is_reference(policy):
        return _ORACLE | {"marker": "o" if policy == "page-oracle" else "s"}
    colour, marker = _STYLES.get(policy) or _OTHERS[zlib.crc32(policy.encode()) % len(_OTHERS)]
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2.2 if policy == "quest" else 1.3}


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
