"""The pages that were read: over time, and for one answer by layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import BoundaryNorm, ListedColormap
from torch.nn.functional import pad

from .style import new_figure, save, set_title

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

# A page needs this share of the width of a plot of all pages to be seen.
_MOST_COLUMNS = 300
_LEAST_WIDTH = 1 / 500
# Pages to either side of the fact in the lower panel.
_ZOOM_PAGES = 12
_FACT_COLOUR, _DENSE_COLOUR, _INK = "#D55E00", "#DDDDDD", "#333333"


def pages_over_time(pages: dict[int, Tensor], page_size: int, title: str, path: Path) -> None:
    """For each layer, float [steps, P]: the share of its lists that a page is in. Time goes down."""
    figure = new_figure(11, 0.8 + 1.9 * len(pages))
    panels = figure.subplots(len(pages), 1, squeeze=False, sharex=True)
    for (layer, shares), axes in zip(pages.items(), panels[:, 0], strict=True):
        # Neighbours share a column where a page would be too narrow to be seen; the column shows the most read.
        together = -(-shares.shape[1] // _MOST_COLUMNS)
        missing = -shares.shape[1] % together
        counts = pad(shares, (0, missing)).unflatten(1, (-1, together)).amax(2)
        extent: Any = (0, counts.shape[1] * together * page_size, counts.shape[0], 0)
        image = axes.imshow(
            counts.tolist(), cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=extent
        )
        axes.set_ylabel(f"layer {layer}", fontsize=10)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    set_title(figure, title)
    figure.supylabel("decoded token, the question's first", fontsize=10)
    panels[-1, 0].set_xlabel("position in tokens")
    figure.colorbar(image, ax=panels, label="share of the layer's page lists that hold the page", aspect=40, pad=0.01)
    save(figure, path)


@dataclass(frozen=True)
class AnswerPages:
    """The pages that were read for the tokens of one answer.

    Attributes:
        counts: int64 [Hkv, P] of each layer that reads pages: the number of the answer's tokens that read a page.
        num_layers: all layers; those without counts are dense.
        page_size: S.
        length: tokens in the cache at the end of the answer.
        answer_tokens: tokens of the answer.
        text_tokens: tokens of the text.
    """

    counts: dict[int, Tensor]
    num_layers: int
    page_size: int
    length: int
    answer_tokens: int
    text_tokens: int


def pages_of_answer(answer: AnswerPages, fact: tuple[int, int], others: Sequence[int], title: str, path: Path) -> None:
    """The pages that each layer and KV head read, over the whole text and around the fact.

    Args:
        answer: the pages.
        fact: where the fact that was asked for begins and ends, in tokens.
        others: where the other facts begin.
        title: of the plot.
        path: of the PNG.
    """
    blues, most = colormaps["Blues"], answer.answer_tokens
    # A step for each token of the answer, from a tint that still shows on white.
    scale = ScalarMappable(
        norm=BoundaryNorm([n + 0.5 for n in range(most + 1)], most),
        cmap=ListedColormap([blues(0.25 + 0.75 * n / most) for n in range(1, most + 1)]),
    )
    rows = answer.num_layers * len(next(iter(answer.counts.values()), [None]))
    figure = new_figure(12, 2.8 + 0.38 * rows)
    set_title(figure, title)
    whole, near = figure.subplots(2, 1)
    _draw_rows(whole, answer, 0, answer.length, scale)
    _mark_facts(whole, fact[0], others, answer.length)
    whole.set_xlabel(
        f"position in tokens; question and answer follow the text's {answer.text_tokens:,}; pages are drawn wider",
        fontsize=10,
    )

    start, stop = fact
    reach = _ZOOM_PAGES * answer.page_size
    middle = (start + stop) // 2 // answer.page_size * answer.page_size
    _draw_rows(near, answer, max(0, middle - reach), min(answer.length, middle + reach), scale)
    near.axvspan(start, stop, facecolor="none", edgecolor=_FACT_COLOUR, linewidth=1.5, zorder=4)
    near.set_title("the same around the fact (outlined)", loc="left", fontsize=10)
    near.set_xlabel("position in tokens", fontsize=10)

    bar = figure.colorbar(scale, ax=[whole, near], fraction=0.02, pad=0.01, ticks=range(1, most + 1))
    bar.set_label(f"for how many of the {most} digits a page was read", fontsize=10)
    bar.ax.tick_params(length=0)
    save(figure, path)


def _mark_facts(axes: Any, start: int, others: Sequence[int], length: int) -> None:
    axes.axvline(start, color=_FACT_COLOUR, linewidth=1.5, zorder=4)
    above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    if others:  # a line of no points has no extent, and the layout of the figure collapses
        axes.plot(others, [1.03] * len(others), "v", color="#999999", markersize=5, **above)
    axes.plot([start], [1.03], "v", color=_FACT_COLOUR, markersize=8, **above)
    on_left = start < length / 2
    axes.annotate(
        f"the fact, at token {start:,}" + (" (in grey: the others)" if others else ""),
        (start, 1.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(8 if on_left else -8, 6),
        textcoords="offset points",
        ha="left" if on_left else "right",
        color=_FACT_COLOUR,
        fontsize=10,
    )


def _draw_rows(axes: Any, answer: AnswerPages, first: int, last: int, scale: Any) -> None:
    """A row for each layer and KV head, layer 0 at the top, for the tokens from ``first`` to ``last``."""
    page_size = answer.page_size
    heads = len(next(iter(answer.counts.values()), [None]))
    half = max(page_size, (last - first) * _LEAST_WIDTH) / 2
    boxes, counts = [], []
    ticks: dict[float, str] = {}
    for layer in range(answer.num_layers):
        top = layer * (heads + 0.5)
        if layer not in answer.counts:
            ticks[top + heads / 2] = f"layer {layer}"
            axes.fill_between([first, last], top, top + heads, color=_DENSE_COLOUR, linewidth=0)
            axes.annotate(
                "dense: reads everything",
                (first, top + heads / 2),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=_INK,
            )
            continue
        for head, row in enumerate(answer.counts[layer]):
            y = top + head
            ticks[y + 0.45] = f"{f'layer {layer}, ' if head == 0 else ''}KV head {head}"
            for page in row.nonzero().flatten().tolist():
                left, right = (page + 0.5) * page_size - half, (page + 0.5) * page_size + half
                boxes.append([(left, y), (right, y), (right, y + 0.9), (left, y + 0.9)])
                counts.append(int(row[page]))
    # The most read last, on top of neighbours that are drawn wider than they are.
    order = sorted(range(len(boxes)), key=counts.__getitem__)
    colours = [scale.to_rgba(counts[i]) for i in order]
    axes.add_collection(PolyCollection([boxes[i] for i in order], facecolors=colours, linewidths=0, zorder=2))
    axes.set_xlim(first, last)
    axes.set_ylim(answer.num_layers * (heads + 0.5) - 0.5, 0)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9, color=_INK)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
