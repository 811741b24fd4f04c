"""Heat maps: accuracy by depth and length; attention mass by layer and head or budget; pages over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .style import pyplot, save

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..results import Cell


def depth_by_length(cells: list[Cell], path: Path) -> None:
    """A panel for each policy and budget: where in the text the fact stood, against the text's length."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({depth for cell in cells for depth, *_ in cell["depths"]})
    rows = list(dict.fromkeys(cell["label"] for cell in cells))
    columns = sorted({cell["budget"] for cell in cells}, key=lambda budget: (budget is None, budget))
    figure, panels = pyplot().subplots(
        len(rows),
        len(columns),
        figsize=(1.2 + 2.3 * len(columns), 2.1 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for label, line in zip(rows, panels, strict=True):
        for budget, axes in zip(columns, line, strict=True):
            found = [cell for cell in cells if (cell["label"], cell["budget"]) == (label, budget)]
            if not found:
                axes.set_axis_off()
                continue
            values = {(cell["length"], depth): value for cell in found for depth, value, _ in cell["depths"]}
            grid = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths], fontsize=8)
            shown = range(0, len(depths), 3)
            axes.set_yticks(shown, [f"{depths[i]:.0%}" for i in shown], fontsize=8)
            axes.set_title(f"{label}\n{'all' if budget is None else f'{budget:,}'}", fontsize=8)
    figure.supylabel("depth of the fact")
    figure.supxlabel("length in tokens")
    figure.colorbar(image, ax=panels, label=cells[0]["metric"])
    save(figure, path)


def grid(values: Tensor, rows: str, columns: str, names: list[str], title: str, path: Path) -> None:
    """Attention mass, float [rows, columns] from 0 to 1, each number in its place."""
    figure, axes = pyplot().subplots(
        figsize=(2.5 + 0.62 * values.shape[1], 1.6 + 0.36 * values.shape[0]), layout="constrained"
    )
    image = axes.imshow(values.tolist(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(values.tolist()):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k")
    axes.set_xticks(range(values.shape[1]), names)
    axes.set_yticks(range(values.shape[0]))
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, label="part of dense attention's weights")
    save(figure, path)


def pages_over_time(pages: dict[int, Tensor], page_size: int, title: str, path: Path) -> None:
    """For each layer, int [steps, P]: how many heads read a page in a step. Time goes down."""
    figure, panels = pyplot().subplots(
        len(pages), 1, figsize=(11, 0.8 + 1.9 * len(pages)), squeeze=False, sharex=True, layout="constrained"
    )
    for (layer, counts), axes in zip(pages.items(), panels[:, 0], strict=True):
        extent: Any = (0, counts.shape[1] * page_size, counts.shape[0], 0)
        axes.imshow(
            counts.tolist(), cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=extent
        )
        axes.set_ylabel(f"layer {layer}\ndecoded token", fontsize=8)
    panels[0, 0].set_title(title, loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("position in tokens")
    save(figure, path)
