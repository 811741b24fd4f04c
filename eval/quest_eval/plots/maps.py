"""Heat maps: accuracy by depth and length, attention mass by layer and head or budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .style import new_figure, save, set_title

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..results.cells import Cell


def depth_by_length(cells: list[Cell], path: Path) -> None:
    """The depth of the fact against the length of the text: a column for each policy, a row for each budget."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({depth for cell in cells for depth, *_ in cell["depths"]})
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    budgets = sorted({cell["budget"] for cell in cells if cell["budget"] is not None}) or [None]
    figure = new_figure(max(4, 2 + (0.5 + 0.25 * len(lengths)) * len(labels)), max(3.4, 1 + 1.2 * len(budgets)))
    panels = figure.subplots(len(budgets), len(labels), sharex=True, sharey=True, squeeze=False)
    for budget, row in zip(budgets, panels, strict=True):
        for label, axes in zip(labels, row, strict=True):
            # A policy without a budget is the same in all rows.
            found = [cell for cell in cells if cell["label"] == label and cell["budget"] in (None, budget)]
            values = {(cell["length"], depth): value for cell in found for depth, value, _ in cell["depths"]}
            grid = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            axes.tick_params(length=0)
        row[0].set_ylabel("all" if budget is None else f"{budget:,}")
    for label, axes in zip(labels, panels[0], strict=True):
        axes.set_title(label.replace(", ", ",\n"), fontsize=9)
    shown = range(0, len(depths), 3)
    panels[0][0].set_xticks(
        range(len(lengths)),
        [f"{length:,}" if length % 1024 else f"{length // 1024}K" for length in lengths],
        fontsize=8,
    )
    panels[0][0].set_yticks(shown, [f"{depths[i]:.0%}" for i in shown], fontsize=8)
    figure.supylabel("budget in tokens; in a row,\nthe depth of the fact", fontsize=10)
    figure.supxlabel("length in tokens", fontsize=10)
    figure.colorbar(image, ax=panels, label=cells[0]["metric"], aspect=40, pad=0.01)
    save(figure, path)


def grid(values: Tensor, rows: str, columns: str, names: list[str], title: str, path: Path) -> None:
    """Attention mass, float [rows, columns] from 0 to 1, each number in its place."""
    figure = new_figure(max(5, 2.5 + 0.62 * values.shape[1]), 1.8 + 0.36 * values.shape[0])
    axes = figure.subplots()
    image = axes.imshow(values.tolist(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(values.tolist()):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k")
    axes.set_xticks(range(values.shape[1]), names)
    axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    set_title(figure, title)
    figure.colorbar(image, label="share of dense attention's weights")
    save(figure, path)
