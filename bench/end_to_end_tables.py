"""Tables of whole models from the JSON of bench/end_to_end.py and bench/transformers_generate.py.

Rows that a JSON lacks, such as those that a GPU has no memory for, are left out.
"""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]
Table = list[list[str]]  # the first row is the header

PAPER, DEFAULT, ALL_SPARSE = "paper, 2048", "default, 2048", "no dense layers, 1024"
KEPT, DENSE_BELOW = "no dense layers, 2048, a selection for 4 steps", "default, 2048, dense below 8K"
STAGES = ("matrix products", "dense layers", "sparse layers", "other kernels", "gaps")
#: The rows of the paper and of users: those with targets, and a long one.
SHORT = (
    "Llama-2-7B, int4, 32K, B 1",
    "Llama-2-7B, bf16, 32K, B 1",
    "Llama-3.1-8B, bf16, 32K, B 1",
    "Llama-3.1-8B, bf16, 32K, B 8",
    "Llama-3.1-8B, bf16, 128K, B 1",
    "Llama-3.1-8B, int4, 128K, B 1",
    "Llama-2-7B, int4, 128K, B 1",
)
SAME_AS_GRAPH = "Llama-3.1-8B, bf16, 32K, B 1"  # generate()'s model and prompt


def ms(entry: dict[str, Any]) -> float:
    return float(entry["milliseconds"]["median"])


def fastest(row: dict[str, Any]) -> dict[str, Any]:
    return row["dense"][row["fastest_dense"]]


def gain(row: dict[str, Any], choice: str) -> float:
    return ms(fastest(row)) / ms(row["quest"][choice])


def cell(row: dict[str, Any], choice: str) -> str:
    return f"{ms(row['quest'][choice]):.2f} ({gain(row, choice):.2f}x)" if choice in row["quest"] else "-"


def named(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def short(rows: Rows) -> Table:
    """The rows with targets."""
    table = [["model, weights, context, batch", "fastest dense", "the paper's, 2,048", "default, 2,048"]]
    table[0] += ["1,024, no dense layers", "2,048, no dense layers, a selection for 4 steps"]
    for name in SHORT:
        if row := named(rows).get(name):
            cells = [cell(row, choice) for choice in (PAPER, DEFAULT, ALL_SPARSE, KEPT)]
            table.append([name, f"{ms(fastest(row)):.2f}", *cells])
    return table


def grid(rows: Rows) -> Table:
    """All rows and configurations, with the most memory of dense attention and of Quest."""
    choices = list(dict.fromkeys(choice for row in rows for choice in row["quest"]))
    table = [["model, weights, context, batch", "fastest dense", *choices, "GB, dense", "GB, Quest"]]
    for row in rows:
        memory = [f"{entry['peak_bytes'] / 1e9:.1f}" for entry in (fastest(row), row["quest"][DEFAULT])]
        cells = [cell(row, choice) for choice in choices]
        table.append([row["name"], f"{ms(fastest(row)):.2f} ({row['fastest_dense']})", *cells, *memory])
    return table


def stages(rows: Rows) -> Table:
    """Milliseconds of each stage, kernels of a step, attention's share and tokens a second of the rows with targets."""
    table = [["model, weights, context, batch", "attention", *STAGES, "step", "kernels", "attention's share"]]
    table[0].append("tokens/s")
    for name in SHORT:
        if not (row := named(rows).get(name)):
            continue
        entries = {row["fastest_dense"]: fastest(row)} | {
            choice: row["quest"][choice] for choice in (PAPER, DEFAULT, ALL_SPARSE, KEPT) if choice in row["quest"]
        }
        for choice, entry in entries.items():
            cells = [f"{entry['stages'][stage]:.2f}" for stage in STAGES] if "stages" in entry else ["-"] * len(STAGES)
            cells += [f"{ms(entry):.2f}", str(entry.get("kernels", "-")), f"{100 * entry['attention_share']:.0f}%"]
            table.append([name, choice, *cells, f"{entry['tokens_per_second']:.0f}"])
    return table


def families(rows: Rows) -> dict[str, Rows]:
    """The rows of each model, weights and batch, by context."""
    found: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        found.setdefault(f"{row['shape']['name']}, {row['weights']}, B {row['batch']}", []).append(row)
    return found


def break_even(rows: Rows) -> Table:
    """The context from which on the default configuration is faster than dense.

    Then its most cost over dense before that, and the most with ``dense_below``.
    """
    table = [
        ["model, weights, batch", "faster from", "most over dense below", "there", "most with `dense_below`", "there"]
    ]
    for name, family in families(rows).items():
        slower = [row for row in family if gain(row, DEFAULT) < 1]
        faster = [row for row in family if not slower or row["context"] > slower[-1]["context"]]
        cells = [f"{faster[0]['context'] >> 10}K" if faster else "never"]
        for choice in (DEFAULT, DENSE_BELOW):
            if measured := [row for row in slower if choice in row["quest"]]:
                worst = min(measured, key=lambda row: gain(row, choice))
                cells += [f"{100 / gain(worst, choice) - 100:+.1f}%", f"{worst['context'] >> 10}K"]
            else:
                cells += ["-", "-"]
        table.append([name, *cells])
    return table


def generate(rows: Rows) -> Table:
    """Each way to run ``generate``, and its gain over the fastest of sdpa."""
    table = [["`generate()`", "first token, s", "ms a token", "peak, GB", "over the best of sdpa"]]
    for row in rows:
        times = [f"{row['first_token_seconds']:.2f}", f"{ms(row):.2f}", f"{row['peak_bytes'] / 1e9:.1f}"]
        table.append([row["name"], *times, f"{best_of_sdpa(rows) / ms(row):.2f}x"])
    return table


def best_of_sdpa(rows: Rows) -> float:
    return min(ms(row) for row in rows if row["name"].startswith("sdpa"))


def targets(rows: Rows, generated: Rows) -> Table:
    """The targets of whole models."""
    found, ways = named(rows), named(generated)
    table = [["", "target", "measured", ""]]

    def add(what: str, target: float, measured: float, most: bool = False) -> None:
        met = measured <= target if most else measured >= target
        sign = "at most" if most else "at least"
        table.append([what, f"{sign} {target:g}x", f"{measured:.2f}x", "met" if met else "missed"])

    for name, choice, what, target in (
        (SHORT[0], PAPER, "the paper's configuration", 2.23),
        (SHORT[0], ALL_SPARSE, "1,024 tokens, no dense layers", 2.5),
        (SHORT[0], KEPT, "2,048 tokens, no dense layers, a selection for 4 steps", 2.5),
        (SHORT[3], ALL_SPARSE, "1,024 tokens, no dense layers", 2.3),
        (SHORT[4], ALL_SPARSE, "1,024 tokens, no dense layers", 2.1),
        (SHORT[4], KEPT, "2,048 tokens, no dense layers, a selection for 4 steps", 2.1),
    ):
        if name in found and choice in found[name]["quest"]:
            add(f"{name}: {what}", target, gain(found[name], choice))
    if quest := ways.get("quest, compiled"):
        add("`generate()` over the best of sdpa", 2.8, best_of_sdpa(generated) / ms(quest))
        if SAME_AS_GRAPH in found:
            graph = ms(found[SAME_AS_GRAPH]["quest"][DEFAULT])
            add("`generate()`, of the time of the CUDA graph", 1.1, ms(quest) / graph, most=True)
    slower = [row for row in rows if gain(row, DEFAULT) < 1]
    for choice, what in ((DEFAULT, "default"), (DENSE_BELOW, "with `dense_below`")):
        if measured := [row for row in slower if choice in row["quest"]]:
            worst = min(measured, key=lambda row: gain(row, choice))
            name = f"below the break-even, of dense, {what}: {worst['name']}"
            add(name, 1.02, 1 / gain(worst, choice), most=True)
    return table
