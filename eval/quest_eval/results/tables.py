"""Results as tables: on the terminal, and in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cells import Cell


def tables(cells: list[Cell]) -> Iterator[Table]:
    """For each task and length a table: policies by budgets, and the KV cache read and held at the largest.

    A second table has the genres of a task that has several.
    """
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in cells):
        found = [cell for cell in cells if (cell["task"], cell["length"]) == (task, length)]
        yield _table(f"{task}, {length:,} tokens: {found[0]['metric']} ({found[0]['tries']} tries)", found)
        if "genres" in found[0]:
            yield _genres(f"{task}, {length:,} tokens: {found[0]['metric']}, by genre", found)


def markdown(cells: list[Cell]) -> str:
    """For each task a table in Markdown: policies by budgets, in each place a value for each length."""
    markdown_tables = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        found = [cell for cell in cells if cell["task"] == task]
        lengths = sorted({cell["length"] for cell in found})
        budgets = sorted({cell["budget"] for cell in found if cell["budget"] is not None}) or [None]
        values = {(c["label"], c["budget"], c["length"]): f"{c['value']:.2f}" for c in found}
        metric = found[0]["metric"]
        measured = metric if metric == task else f"{task}, {metric}"
        title = f"{measured} at {' / '.join(f'{length:,}' for length in lengths)} tokens"
        lines = [
            [title, *("all" if budget is None else f"{budget:,}" for budget in budgets)],
            ["---"] * (1 + len(budgets)),
        ]
        for label in dict.fromkeys(cell["label"] for cell in found):
            # A policy without a budget is the same at all of them.
            row = [
                [values.get((label, budget, length)) or values.get((label, None, length), "") for length in lengths]
                for budget in budgets
            ]
            lines.append([label, *(" / ".join(place) for place in row)])
        markdown_tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(markdown_tables) + "\n"


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
        values = (f"{row[budget]['value']:.2f}" if budget in row else "" for budget in (*budgets, None))
        table.add_row(label, *values, *shares)
    return table


def _genres(title: str, cells: list[Cell]) -> Table:
    """Policies and budgets by genres."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy")
    for name in ("budget", *cells[0]["genres"]):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        budget = "all" if cell["budget"] is None else f"{cell['budget']:,}"
        table.add_row(cell["label"], budget, *(f"{value:.2f}" for value in cell["genres"].values()))
    return table
