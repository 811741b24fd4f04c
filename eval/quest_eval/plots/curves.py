"""Lines: the metric against the budget, perplexity against the position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .style import is_reference, line, new_figure, save

if TYPE_CHECKING:
    from pathlib import Path

    from ..results.cells import Cell

# More lines than this in one panel cannot be told apart.
_MOST_LINES = 9
# Panels of positions, one for each budget.
_MOST_BUDGETS = 4


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
        for length, axes in zip(lengths, row, strict=True):
            for name in names:
                _draw_policy(axes, [cell for cell in cells if (cell["length"], cell["policy"]) == (length, name)])
            axes.set_title(f"{length:,} tokens", loc="left", fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{metric} of {task}" if task != metric else metric)
        # A policy may have been run at one of the lengths only.
        handles = {
            label: handle for axes in row for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
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
    variants = [name for name in names if name.startswith("quest-")]
    if len(names) <= _MOST_LINES or not variants:
        return [names]
    rivals = [name for name in names if name not in variants]
    return [rivals, [name for name in names if is_reference(name) or name.startswith("quest")]]


def _draw_policy(axes: Any, cells: list[Cell]) -> None:
    if not cells:
        return
    style = line(cells[0]["policy"])
    if cells[0]["budget"] is None:
        axes.axhline(cells[0]["value"], label=cells[0]["label"], **style)
        return
    cells = sorted(cells, key=lambda cell: cell["budget"])
    x, y, error = ([cell[key] for cell in cells] for key in ("budget", "value", "error"))
    # Perplexity varies far more between texts than between policies, so bars would hide the policies' differences.
    bars = None if cells[0]["metric"] == "perplexity" else error
    axes.errorbar(x, y, bars, label=cells[0]["label"], capsize=2, elinewidth=0.8, **style)


def against_position(cells: list[Cell], path: Path) -> None:
    """A panel for each length and budget, a line for each policy, with dense in all."""
    lengths = sorted({cell["length"] for cell in cells})
    budgets = sorted({cell["budget"] for cell in cells if cell["budget"] is not None})[:_MOST_BUDGETS] or [None]
    names = _rows(list(dict.fromkeys(cell["policy"] for cell in cells)))[0]
    figure = new_figure(2.6 + 5 * len(lengths), 0.5 + 2.4 * len(budgets))
    panels = figure.subplots(len(budgets), len(lengths), sharex="col", sharey=True, squeeze=False)
    for budget, row in zip(budgets, panels, strict=True):
        for length, axes in zip(lengths, row, strict=True):
            for cell in cells:
                if cell["length"] == length and cell["budget"] in (None, budget) and cell["policy"] in names:
                    style = line(cell["policy"]) | {"marker": ""}
                    axes.plot(*zip(*cell["curve"], strict=True), label=cell["label"], **style)
            axes.set_title(f"{length:,} tokens, budget {budget or 'all'}", loc="left", fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("perplexity")
    panels[0][0].set_yscale("log")  # a single surprising token would flatten all others
    for axis in (panels[0][0].yaxis.set_major_formatter, panels[0][0].yaxis.set_minor_formatter):
        axis(lambda y, _: f"{y:g}")
    figure.supxlabel("position in tokens", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    save(figure, path)
