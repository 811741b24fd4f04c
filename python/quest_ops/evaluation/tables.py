"""Results on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .results import Cell


def tables(cells: list[Cell]) -> Iterator[Table]:
    """For each task and length a table: policies by budgets, and what they read at the largest."""
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in cells):
        found = [cell for cell in cells if (cell["task"], cell["length"]) == (task, length)]
        yield _table(f"{task}, {length:,} tokens: {found[0]['metric']} ({found[0]['tries']} tries)", found)


def _table(title: str, cells: list[Cell]) -> Table:
    budgets = sorted({cell["budget"] for cell in cells if cell["budget"] is not None})
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("budget in tokens")
    for name in (*(f"{budget:,}" for budget in budgets), "all", "KV read", "KV held"):
        table.add_column(name, justify="right", no_wrap=True)
    for label in dict.fromkeys(cell["label"] for cell in cells):
        row = {cell["budget"]: cell for cell in cells if cell["label"] == label}
        largest = row.get(None) or row[max(row)]
        shares = (f"{largest[name] / largest['kv_bytes_dense']:.1%}" for name in ("kv_bytes_read", "kv_bytes_held"))
        values = (f"{row[budget]['value']:.3g}" if budget in row else "" for budget in (*budgets, None))
        table.add_row(label, *values, *shares)
    return table
