"""Figures, and a colour and marker for each policy: its own in every plot, and no two alike in one figure."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: Rivals and Quest's variants mostly have panels of their own, so some share a colour.
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
    "sparq": ("#332288", "X"),
    "summary": ("#882255", "h"),
    "two-stage": ("#44AA99", "p"),
}
#: For policies with fields, those of one's own, and those whose colour another one in the figure has.
_OTHERS = (
    ("#882255", "h"), ("#44AA99", "p"), ("#117733", ">"), ("#332288", "<"), ("#777777", "X"), ("#8B6914", "P"),
    ("#56B4E9", "*"), ("#CC79A7", "D"), ("#E69F00", "^"), ("#009E73", "s"), ("#D55E00", "v"), ("#0072B2", "d"),
)  # fmt: skip
_DENSE = {"color": "black", "linestyle": "--", "linewidth": 1.5}
_ORACLES = {
    "page-oracle": {"color": "black", "linestyle": ":", "linewidth": 1.5, "marker": "o", "markersize": 4},
    "token-oracle": {
        "color": "#555555", "linestyle": "-.", "linewidth": 1.0, "marker": "s", "markersize": 6, "fillstyle": "none",
    },
}  # fmt: skip
# Characters of a title of font size 10 that an inch holds.
_CHARACTERS_AN_INCH = 11


def new_figure(width: float, height: float) -> Any:
    """A figure of that many inches. It belongs to no window, so no backend is chosen and none has to be closed."""
    return Figure(figsize=(width, height), layout="constrained")


def is_reference(policy: str) -> bool:
    """Whether a policy is a limit that others are compared with: dense attention and the oracles."""
    return policy == "dense" or policy.endswith("-oracle")


def lines(policies: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The style of each policy's line, as keywords of matplotlib. No two have one colour while there are enough."""
    names = list(dict.fromkeys(policies))
    result = {}
    used: set[str] = set()
    # Quest first, then policies with a style of their own: a policy added to a figure leaves their colours as they are.
    for name in sorted(names, key=lambda name: (name != "quest", name not in _STYLES)):
        if is_reference(name):
            result[name] = _ORACLES.get(name, _DENSE)
            continue
        free = [style for style in _OTHERS if style[0] not in used] or [_OTHERS[len(used) % len(_OTHERS)]]
        colour, marker = own if (own := _STYLES.get(name)) and own[0] not in used else free[0]
        used.add(colour)
        result[name] = {
            "color": colour,
            "marker": marker,
            "markersize": 5,
            "linewidth": 2.2 if name == "quest" else 1.3,
        }
    return {name: result[name] for name in names}


def set_title(figure: Any, text: str) -> None:
    """A title over the whole figure from its left edge, on as many lines as its width asks for."""
    width = int(figure.get_figwidth() * _CHARACTERS_AN_INCH)
    figure.suptitle(textwrap.fill(text, width, break_on_hyphens=False), x=0.01, ha="left", fontsize=10)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
