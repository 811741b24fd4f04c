"""Lines: the metric against the budget, and perplexity over dense attention's against the position."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps

from .style import is_reference, lines, new_figure, save, set_title

if TYPE_CHECKING:
    from pathlib import Path

    from ..results.cells import Cell

# More lines than this in one panel cannot be told apart.
_MOST_LINES = 9
# Points of a line over the positions: the sections of a curve are averaged, as one surprising token hides a trend.
_MOST_POINTS = 12
# Panels beside each other over the positions.
_MOST_COLUMNS = 4
# Policies of equal score are drawn beside each other: the width that their markers take, in powers of two.
_DODGE = 0.24


def against_budget(cells: list[Cell], path: Path) -> None:
    """A column for each length, a line for each policy; dense is a level.

    Many policies get two rows: Quest among its rivals, and Quest among its variants.
    """
    lengths = sorted({cell["length"] for cell in cells})
    rows = _rows(list(dict.fromkeys(cell["policy"] for cell in cells)))
    task, metric = cells[0]["task"], cells[0]["metric"]
    figure = new_figure(2.6 + 4.4 * len(lengths), 0.5 + 3.9 * len(rows))
    panels = figure.subplots(len(rows), len(lengths), sharex=True, sharey=True, squeeze=False)
    budgets = sorted({cell["budget"] for cell in cells if cell["budget"] is not None})
    for names, row in zip(rows, panels, strict=True):
        styles = lines(names)
        for length, axes in zip(lengths, row, strict=True):
            for i, name in enumerate(names):
                found = [cell for cell in cells if (cell["length"], cell["policy"]) == (length, name)]
                _draw_policy(axes, found, styles[name], 2 ** (_DODGE * (i / max(1, len(names) - 1) - 0.5)))
            axes.set_title(f"{length:,} tokens", loc="left", fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(metric if metric.startswith("perplexity") else f"{metric} of {task}")
        # A policy may have been run at one of the lengths only.
        handles = {
            textwrap.fill(label, 30): handle
            for axes in row
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        row[-1].legend(
            handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, frameon=False
        )
    first = panels[0][0]
    first.set_xscale("log", base=2)
    first.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    first.minorticks_off()
    if not metric.startswith("perplexity"):
        first.set_ylim(-0.03, 1.03)
    bars = "" if metric.startswith("perplexity") else " (bars: standard error over the tries)"
    figure.supxlabel(f"budget in tokens{bars}", fontsize=10)
    save(figure, path)


def _rows(names: list[str]) -> list[list[str]]:
    variants = [name for name in names if name.startswith(("quest-", "quest,"))]
    if len(names) <= _MOST_LINES or not variants:
        return [names]
    rivals = [name for name in names if name not in variants]
    return [rivals, [name for name in names if is_reference(name) or name.startswith("quest")]]


def _draw_policy(axes: Any, cells: list[Cell], style: dict[str, Any], shift: float) -> None:
    if not cells:
        return
    if cells[0]["budget"] is None:
        axes.axhline(cells[0]["value"], label=cells[0]["label"], **style)
        return
    cells = sorted(cells, key=lambda cell: cell["budget"])
    x, y, error = ([cell[key] for cell in cells] for key in ("budget", "value", "error"))
    # Perplexity varies far more between texts than between policies, so bars would hide the policies' differences.
    bars = None if cells[0]["metric"] == "perplexity" else error
    axes.errorbar(
        [budget * shift for budget in x], y, bars, label=cells[0]["label"], capsize=2, elinewidth=0.8, **style
    )


def against_position(cells: list[Cell], path: Path) -> None:
    """A panel for each length and policy, a line for each budget: perplexity over that of dense attention.

    Without dense among the cells it is the perplexity itself.
    """
    lengths = sorted({cell["length"] for cell in cells})
    dense = {cell["length"]: _points(cell) for cell in cells if cell["policy"] == "dense"}
    names = [name for name in _rows(list(dict.fromkeys(cell["policy"] for cell in cells)))[0] if name != "dense"]
    names = names or ["dense"]  # alone
    budgets = sorted({cell["budget"] for cell in cells if cell["budget"] is not None})
    columns = min(_MOST_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(1.8 + 2.6 * columns, 1.2 + 2.1 * rows * len(lengths))
    panels = figure.subplots(rows * len(lengths), columns, sharey=True, squeeze=False)
    of_dense = names != ["dense"] and bool(dense)
    for i, length in enumerate(lengths):
        block = panels[i * rows : (i + 1) * rows].flatten()
        for name, axes in zip(names, block, strict=False):
            found = [cell for cell in cells if (cell["length"], cell["policy"]) == (length, name)]
            for cell in sorted(found, key=lambda cell: cell["budget"] or 0):
                points = _points(cell)
                if of_dense and length in dense:
                    points = {x: y / dense[length][x] for x, y in points.items() if x in dense[length]}
                shade = budgets.index(cell["budget"]) / max(1, len(budgets) - 1) if cell["budget"] else 0
                label = "all" if cell["budget"] is None else f"{cell['budget']:,}"
                axes.plot(
                    list(points), list(points.values()), color=colormaps["viridis_r"](0.1 + 0.9 * shade), label=label
                )
            if found:
                title = textwrap.fill(f"{found[0]['label']}: {length:,} tokens", 34)
                axes.set_title(title, loc="left", fontsize=9)
            if of_dense:
                axes.axhline(1, color="black", linestyle="--", linewidth=1)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        for axes in block[len(names) :]:
            axes.remove()
    if not of_dense:
        panels[0][0].set_yscale("log")
        for axis in (panels[0][0].yaxis.set_major_formatter, panels[0][0].yaxis.set_minor_formatter):
            axis(lambda y, _: f"{y:g}")
    set_title(figure, "Perplexity over that of dense attention (dashed)" if of_dense else "Perplexity")
    figure.supxlabel("position in tokens", fontsize=10)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        title="budget\nin tokens",
        loc="outside right center",
        fontsize=9,
        frameon=False,
    )
    save(figure, path)


def _points(cell: Cell) -> dict[float, float]:
    """The perplexity of a curve's neighbouring sections together, by their middle position."""
    curve = cell["curve"]
    together = -(-len(curve) // _MOST_POINTS)
    groups = [curve[i : i + together] for i in range(0, len(curve), together)]
    return {
        sum(x for x, _ in group) / len(group): math.exp(sum(math.log(y) for _, y in group) / len(group))
        for group in groups
    }
