"""Plots of results. Colours are those of Okabe and Ito and scales of one hue: safe for the colour-blind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import curves, maps

if TYPE_CHECKING:
    from pathlib import Path

    from ..results.cells import Cell


def draw(cells: list[Cell], folder: Path) -> list[str]:
    """Every plot for which the cells have data; returns the names of the files written."""
    names = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        found = [cell for cell in cells if cell["task"] == task]
        if any(cell["budget"] is not None for cell in found):
            names.append(f"{task}-budget.png")
            curves.against_budget(found, folder / names[-1])
        if any(cell["curve"] for cell in found):
            names.append(f"{task}-position.png")
            curves.against_position(found, folder / names[-1])
        if any(cell["depths"] for cell in found):
            names.append(f"{task}-depth.png")
            maps.depth_by_length(found, folder / names[-1])
    return names
