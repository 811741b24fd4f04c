"""Pictures of what was read. Colours are those of Okabe and Ito and a single-hue scale: safe for the colour-blind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .needles import KEY_DIGITS, Fact

if TYPE_CHECKING:
    from pathlib import Path

    from .runs import Reading

_FACT_COLOUR = "#D55E00"
_DENSE_COLOUR = "#DDDDDD"
_INK = "#333333"
# A page may be narrower than a pixel: it is drawn at least this wide, as a part of the axis.
_LEAST_WIDTH = 1 / 500
# Pages to either side of the fact in the lower panel.
_ZOOM_PAGES = 20


def draw_reading(reading: Reading, facts: list[Fact], text_tokens: int, path: Path) -> None:
    """Write a PNG: the pages each layer and KV head read for one answer, over the whole text and around the fact."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    blues = plt.get_cmap("Blues")
    # A step for each number of digits, from a tint that still shows on white.
    scale = ScalarMappable(
        norm=BoundaryNorm([n + 0.5 for n in range(KEY_DIGITS + 1)], KEY_DIGITS),
        cmap=ListedColormap([blues(0.25 + 0.75 * n / KEY_DIGITS) for n in range(1, KEY_DIGITS + 1)]),
    )
    fact, page_size = reading.fact, reading.policy.config.page_size
    layers, heads = reading.counts.shape[:2]
    rows_height = 0.19 * layers * heads
    figure, (whole, near) = plt.subplots(2, 1, figsize=(12, 2.6 + 2 * rows_height), layout="constrained")
    _draw_rows(whole, reading, 0, reading.length, scale)
    whole.set_title(
        f'Pages read to answer "The pass key of {fact.name} is" with {reading.answer.text}: '
        f"budget {reading.policy.budget} of {reading.length:,} tokens, pages of {page_size}",
        loc="left",
        fontsize=12,
        pad=26,
    )
    whole.axvline(fact.start, color=_FACT_COLOUR, linewidth=1.5, zorder=4)
    others = [other.start for other in facts if other.start != fact.start]
    above: dict[str, Any] = {"transform": whole.get_xaxis_transform(), "clip_on": False}
    whole.plot(others, [1.03] * len(others), "v", color="#999999", markersize=5, **above)
    whole.plot([fact.start], [1.03], "v", color=_FACT_COLOUR, markersize=8, **above)
    on_left = fact.start < reading.length / 2
    whole.annotate(
        f"the fact, at token {fact.start:,}" + (" (in grey: the others)" if others else ""),
        (fact.start, 1.03),
        xycoords=whole.get_xaxis_transform(),
        xytext=(8 if on_left else -8, 6),
        textcoords="offset points",
        ha="left" if on_left else "right",
        color=_FACT_COLOUR,
        fontsize=10,
    )
    whole.set_xlabel(f"position in tokens; question and answer follow the text's {text_tokens:,}", fontsize=10)

    middle = (fact.start + fact.stop) // 2 // page_size * page_size
    first = max(0, middle - _ZOOM_PAGES * page_size)
    last = min(reading.length, middle + _ZOOM_PAGES * page_size)
    _draw_rows(near, reading, first, last, scale)
    near.axvspan(fact.start, fact.stop, facecolor="none", edgecolor=_FACT_COLOUR, linewidth=1.5, zorder=4)
    near.set_title("the same around the fact (outlined)", loc="left", fontsize=10)
    near.set_xlabel("position in tokens", fontsize=10)

    bar = figure.colorbar(scale, ax=[whole, near], fraction=0.02, pad=0.01, ticks=range(1, KEY_DIGITS + 1))
    bar.set_label(f"for how many of the {KEY_DIGITS} digits a page was read", fontsize=10)
    bar.ax.tick_params(length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_rows(axes: Any, reading: Reading, first: int, last: int, scale: Any) -> None:
    """A row for each layer and KV head, layer 0 at the top, for the tokens from ``first`` to ``last``."""
    from matplotlib.collections import PolyCollection

    page_size = reading.policy.config.page_size
    layers, heads, _ = reading.counts.shape
    half = max(page_size, (last - first) * _LEAST_WIDTH) / 2
    boxes, counts, ticks = [], [], []
    for layer in range(layers):
        top = layer * (heads + 0.5)
        ticks.append(top + heads / 2)
        if layer in reading.dense_layers:
            axes.fill_between([first, last], top, top + heads, color=_DENSE_COLOUR, linewidth=0)
            axes.annotate("dense: reads everything", (first, top + heads / 2), (6, 0), **_BESIDE)
            continue
        for head in range(heads):
            row, y = reading.counts[layer, head], top + head
            for page in row.nonzero().flatten().tolist():
                left, right = (page + 0.5) * page_size - half, (page + 0.5) * page_size + half
                boxes.append([(left, y), (right, y), (right, y + 0.9), (left, y + 0.9)])
                counts.append(int(row[page]))
    # The most read last, on top of neighbours that are drawn wider than they are.
    order = sorted(range(len(boxes)), key=counts.__getitem__)
    colours = [scale.to_rgba(counts[i]) for i in order]
    axes.add_collection(PolyCollection([boxes[i] for i in order], facecolors=colours, linewidths=0, zorder=2))
    axes.set_xlim(first, last)
    axes.set_ylim(layers * (heads + 0.5) - 0.5, 0)
    axes.set_yticks(ticks, [f"layer {layer}" for layer in range(layers)], fontsize=10, color=_INK)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": _INK}
