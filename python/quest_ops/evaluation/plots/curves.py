"""Lines: the metric against the budget, perplexity against the position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .style import line, pyplot, save

if TYPE_CHECKING:
    from pathlib import Path

    from ..results import Cell


def against_budget(cells: list[Cell], path: Path) -> None:
    """A panel for each length, a line for each policy; dense is a level."""
    lengths = sorted({cell["length"] for cell in cells})
    figure, panels = pyplot().subplots(
        1, len(lengths), figsize=(5.5 * len(lengths), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(cell["policy"] for cell in cells))
    for length, axes in zip(lengths, panels[0], strict=True):
        for name in names:
            found = [cell for cell in cells if (cell["length"], cell["policy"]) == (length, name)]
            style = line(name, names)
            if not found:
                continue
            if found[0]["budget"] is None:
                axes.axhline(found[0]["value"], label=found[0]["label"], **style)
                continue
            found.sort(key=lambda cell: cell["budget"])
            x, y, error = ([cell[key] for cell in found] for key in ("budget", "value", "error"))
            axes.errorbar(x, y, error, label=found[0]["label"], capsize=2, elinewidth=0.8, **style)
        budgets = sorted({cell["budget"] for cell in cells if cell["budget"] is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axes.minorticks_off()
        axes.set_xlabel("budget in tokens")
        axes.set_title(f"{length:,} tokens", loc="left")
        axes.grid(alpha=0.3)
    if cells[0]["metric"] != "perplexity":
        panels[0][0].set_ylim(-0.03, 1.03)
    panels[0][0].set_ylabel(f"{cells[0]['metric']} ({cells[0]['task']}; bars: standard error)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, path)


def against_position(cells: list[Cell], path: Path) -> None:
    """A panel for each length and budget, a line for each policy, with dense in all."""
    places = sorted({(cell["length"], cell["budget"]) for cell in cells if cell["budget"] is not None})
    places = places or [(cell["length"], None) for cell in cells]
    figure, panels = pyplot().subplots(
        len(places), 1, figsize=(9, 2.8 * len(places)), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(cell["policy"] for cell in cells))
    for (length, budget), axes in zip(places, panels[:, 0], strict=True):
        for cell in cells:
            if cell["length"] == length and cell["budget"] in (None, budget):
                style = line(cell["policy"], names) | {"marker": ""}
                axes.plot(*zip(*cell["curve"], strict=True), label=cell["label"], **style)
        axes.set_title(f"{length:,} tokens, budget {budget}", loc="left")
        axes.set_yscale("log")  # a single surprising token would flatten everything else
        axes.set_ylabel("perplexity")
        axes.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("position in tokens")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, path)
