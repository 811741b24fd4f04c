"""Write the tables of README.md and docs/*.md from the JSON in bench/results.

    python bench/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. With --check nothing is written, and pages whose
tables differ from the JSON end the command with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpu
import end_to_end_tables as whole
from nsight_metrics import METRICS, STALL
from selection_study import CHOICES
from targets import DENSE, OWN_DENSE, fastest, median, targets
from workloads import GQA, MHA

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
NINE = (
    MHA,
    replace(MHA, context=131072),
    replace(GQA, context=2048),
    GQA,
    replace(GQA, context=131072),
    replace(GQA, context=524288),
    replace(GQA, context=2097152),
    replace(GQA, batch=8),
    replace(GQA, batch=32),
)

Table = list[list[str]]  # the first row is the header


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def tokens(n: int) -> str:
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K"


def rows_of(name: str) -> Any:
    """The rows of a JSON; none before it is measured."""
    return read(name)["rows"] if (RESULTS / name).exists() else []


def models() -> Any:
    return rows_of("end-to-end-h100.json")


def generated() -> Any:
    return rows_of("generate-h100.json")


def label(workload: dict[str, Any]) -> str:
    """A workload of the JSON as "query/KV heads, batch, context, budget" and whatever is not the default."""
    w = workload
    cells = [f"{w['heads']}/{w['kv_heads']}", str(w["batch"]), tokens(w["context"]), str(w["budget"] or "all")]
    cells += [f"pages of {w['page_size']}"] * (w["page_size"] != 16)
    cells += [f"head_dim {w['head_dim']}"] * (w["head_dim"] != 128)
    cells += {"int8": [], "int4": ["4-bit bounds"]}.get(w["bounds"], ["16-bit bounds"])
    cells += ["mean and std"] * (w.get("std_factor") is not None)
    cells += ["fp16"] * (w["dtype"] == "torch.float16")
    cells += [w["selection"]] * (w["selection"] != "random")
    return ", ".join(cells)


def own_dense(row: dict[str, Any]) -> float:
    """The faster of decode_step over every page, and of sparse_decode after append_kv."""
    return fastest(row, OWN_DENSE)


def fastest_peer(row: dict[str, Any]) -> float:
    return fastest(row, DENSE)


def nine(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {row["workload"]["name"]: row for row in rows}
    return [named[str(w)] for w in NINE]


def steps() -> Table:
    """The nine workloads in short."""
    table = [["query/KV heads, batch, context, budget", "decode step", "fastest dense", "speed-up", "read roofline"]]
    for row in nine(read("kernels-h100.json")["rows"]):
        step, dense = median(row, "pipeline"), fastest_peer(row)
        cells = [f"{step:.1f} us", f"{dense:.1f} us", f"{dense / step:.1f}x", f"{median(row, 'limit'):.1f} us"]
        table.append([label(row["workload"]), *cells])
    return table


def steps_by_default() -> Table:
    """The bounds that QuestConfig has by default: a selection in each step, and for several.

    In brackets the gain over the fastest dense attention.
    """
    named = {row["workload"]["name"]: row for row in read("kernels-h100.json")["rows"]}
    table = [["query/KV heads, context", "budget", "each step selects", "a selection for 2 steps", "for 4 steps"]]
    for w, budgets in ((MHA, (512, 1024, 1536, 2048)), (replace(GQA, context=131072), (512, 1024, 2048))):
        for budget in budgets:
            row = named[str(replace(w, bounds="int4", std_factor=1.0, budget=budget))]
            means = [(median(row, "pipeline") + (n - 1) * median(row, "kept")) / n for n in (1, 2, 4)]
            cells = [f"{us:.1f} us ({fastest_peer(row) / us:.1f}x)" for us in means]
            table.append([f"{w.heads}/{w.kv_heads}, {tokens(w.context)}", f"{budget:,}", *cells])
    return table


def in_full(rows: list[dict[str, Any]]) -> Table:
    columns = "`decode_step`, pages kept, four operators, fastest dense, speed-up, own dense mode, read roofline"
    table = [["query/KV heads, batch, context, budget", *columns.split(", "), "step / roofline"]]
    for row in rows:
        step, dense = median(row, "pipeline"), fastest_peer(row)
        cells = [f"{median(row, name):.1f}" for name in ("pipeline", "kept", "four")]
        cells += [f"{dense:.1f}", f"{dense / step:.2f}x"]
        cells += [f"{own_dense(row):.1f}", f"{median(row, 'limit'):.1f}", f"{row['over_limit']:.2f}x"]
        table.append([label(row["workload"]), *cells])
    return table


def steps_in_full() -> Table:
    """The nine workloads, microseconds."""
    return in_full(nine(read("kernels-h100.json")["rows"]))


def every_workload() -> Table:
    """All workloads, microseconds."""
    return in_full(read("kernels-h100.json")["rows"])


def target_table() -> Table:
    found = targets(read("kernels-h100.json"))
    return [["", "target", "measured", ""], *([*cells, "met" if met else "missed"] for *cells, met in found)]


def number(kernel: dict[str, str], key: str) -> float:
    return float(kernel[key].split()[0].replace(",", ""))


def percent(x: float) -> str:
    return f"{x:.0f} %"


def ratio(x: float) -> str:
    return f"{x:.2f}"


NSIGHT_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "gpu__time_duration.sum": (", us", lambda x: f"{x / 1e3:.1f}"),
    "launch__grid_size": ("", lambda x: f"{x:.0f}"),
    "launch__registers_per_thread": ("", lambda x: f"{x:.0f}"),
    "smsp__inst_executed.sum": (", millions", lambda x: f"{x / 1e6:.1f}"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("", percent),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("", percent),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("", percent),
    "smsp__average_warp_latency_per_inst_issued.ratio": (", cycles", ratio),
    **{
        STALL.format(reason): ("", ratio)
        for reason in ("long_scoreboard", "barrier", "no_instruction", "wait", "short_scoreboard")
    },
}


def nsight(columns: Iterable[tuple[str, dict[str, str]]]) -> Table:
    names, kernels = zip(*columns, strict=True)
    key_of = {metric: key for key, metric in METRICS.items()}
    table = [["metric", *names]]
    for metric, (unit, text) in NSIGHT_ROWS.items():
        table.append([f"`{metric}`{unit}", *(text(number(kernel, key_of[metric])) for kernel in kernels)])
    return table


def nsight_step() -> Table:
    """decode_step."""
    return nsight(
        (f"{name[1]}, {name[2]}, {tokens(int(name[3]))}", kernel)
        for kernel in read("nsight-h100.json")["kernels"]
        if (name := re.fullmatch(r"decode_step: (\S+) B (\d+), (\d+), 2048", kernel["call"]))
    )


def nsight_others() -> Table:
    """Dense mode and topk_pages."""
    columns = []
    for kernel in read("nsight-h100.json")["kernels"]:
        if name := re.fullmatch(r"dense: (\S+), (\d+)", kernel["call"]):
            columns.append((f"dense, {name[1]}, {tokens(int(name[2]))}", kernel))
        elif name := re.fullmatch(r"topk_pages: (\d+) x (\d+), \d+", kernel["call"]):
            columns.append((f"`{kernel['kernel']}`, {name[1]} x {int(name[2]):,}", kernel))
    return nsight(columns)


def cells_of(name: str) -> dict[tuple[str, int | None], dict[str, Any]]:
    """The cells of an evaluation at its longest length, by policy and budget."""
    cells = read(f"evaluation/{name}.json")["cells"]
    longest = max(cell["length"] for cell in cells)
    return {(cell["policy"], cell["budget"]): cell for cell in cells if cell["length"] == longest}


def bytes_read(cell: dict[str, Any]) -> float:
    """Of dense attention's bytes, in all layers."""
    return float(cell["kv_bytes_read"] / cell["kv_bytes_dense"])


def in_row(found: dict[tuple[str, int | None], dict[str, Any]], policy: str, budgets: Iterable[int], form: str) -> str:
    """A policy's values at some budgets. Dense attention has one value, and budgets that were not run leave a dash."""
    if (policy, None) in found:
        return format(found[policy, None]["value"], form)
    return " / ".join(format(c["value"], form) if (c := found.get((policy, n))) else "-" for n in budgets)


def selection() -> Table:
    """SmolLM2: loss over dense and facts found, by selection."""
    loss, facts = cells_of("selection-loss"), cells_of("selection-facts")
    budgets = (256, 512, 1024, 2048)
    table = [["selection", "bytes read, % of dense", "loss over dense, 256 / 512 / 1,024 / 2,048"]]
    table[0].append("facts found, 128 / 256 / 512 / 1,024")
    for choice, policy in CHOICES.items():
        shares = [f"{100 * bytes_read(cell):.1f}" for n in budgets if (cell := loss.get((policy, n)))]
        row = [choice, " / ".join(shares) or "100", in_row(loss, policy, budgets, ".2f")]
        table.append([*row, in_row(facts, policy, (128, 256, 512, 1024), ".2f")])
    return table


def selection_long() -> Table:
    """The bundled model at 32K: eight needles and perplexity, by selection. Two of its six layers are dense."""
    needles, perplexity = cells_of("selection-needles"), cells_of("selection-perplexity")
    budgets = (256, 512, 1024, 2048)
    table = [["selection", "bytes read in sparse layers, % of dense", "needles found, 256 / 512 / 1,024 / 2,048"]]
    table[0].append("perplexity at the same budgets")
    for choice, policy in CHOICES.items():
        # This model has no attention sink, and all of its rows have two dense layers.
        if "sink_pages" in policy or "dense_layers" in policy:
            continue
        shares = [(bytes_read(cell) - 2 / 6) / (4 / 6) for n in budgets if (cell := needles.get((policy, n)))]
        row = [choice, " / ".join(f"{100 * share:.1f}" for share in shares) or "100"]
        table.append([*row, *(in_row(found, policy, budgets, ".2f") for found in (needles, perplexity))])
    return table


RIVALS = ("dense", "quest", "quest-head", "quest-soft", "h2o", "tova", "streaming", "snapkv", "sparq", "page-oracle")


def rivals() -> Table:
    """The bundled model: Quest, its rivals and an oracle."""
    needles, at_8k = cells_of("needles"), {}
    for cell in read("evaluation/perplexity-held-out.json")["cells"]:
        if cell["length"] == 8192:
            at_8k[cell["policy"], cell["budget"]] = cell
    budgets = (64, 256, 1024, 2048)
    table = [["policy", "needles at 32K, 64 / 256 / 1,024 / 2,048", "perplexity at 8K, the same budgets"]]
    table[0] += ["KV read, %", "KV held, %"]
    for policy in RIVALS:
        largest = needles.get((policy, None)) or needles[policy, 2048]
        shares = [100 * largest[name] / largest["kv_bytes_dense"] for name in ("kv_bytes_read", "kv_bytes_held")]
        values = [in_row(found, policy, budgets, ".2f") for found in (needles, at_8k)]
        table.append([f"`{policy}`", *values, *(f"{share:.0f}" for share in shares)])
    return table


def cpu_steps() -> Table:
    """Milliseconds a layer on the CPU, one sequence and one thread."""
    names = (cpu.SDPA, cpu.FLEX, cpu.VLLM, cpu.DENSE, cpu.STEP, f"read: {cpu.STEP}")
    table = [["heads, context, dtype", *names[:-1], "reading alone", "over SDPA", "over vLLM"]]
    for row in read("cpu.json")["rows"]:
        w, times = row["workload"], row["milliseconds"]
        if w["batch"] > 1 or w["threads"] > 1 or w["context"] < 32768:
            continue
        cells = [f"{times[name]['median']:.2f}" if name in times else "-" for name in names]
        ratios = [times[x]["median"] / times[cpu.STEP]["median"] if x in times else None for x in (cpu.SDPA, cpu.VLLM)]
        cells += ["-" if x is None else f"{x:.1f}x" for x in ratios]
        table.append([f"{w['heads']}/{w['kv_heads']}, {tokens(w['context'])}, {w['dtype']}", *cells])
    return table


def cpu_short() -> Table:
    """32/8 heads and 32K tokens."""
    head, *rows = cpu_steps()
    return [head, *(row for row in rows if row[0].startswith("32/8, 32K"))]


def cpu_targets() -> Table:
    """The issue's targets on the CPU, a column a dtype."""
    rows: dict[str, list[str]] = {}
    for what, target, measured, met in cpu.targets(read("cpu.json")["rows"]):
        dtype, name = what.split(": ")
        cells = rows.setdefault(name, [name, "", ""])
        cells[1 if dtype == "bfloat16" else 2] = f"{measured} of {target}, {'met' if met else 'missed'}"
    return [["", "bfloat16", "float32"], *rows.values()]


TABLES: dict[str, Callable[[], Table]] = {
    "end-to-end": lambda: whole.short(models()),
    "end-to-end-grid": lambda: whole.grid(models()),
    "end-to-end-stages": lambda: whole.stages(models()),
    "end-to-end-targets": lambda: whole.targets(models(), generated()),
    "break-even": lambda: whole.break_even(models()),
    "generate": lambda: whole.generate(generated()),
    "steps": steps,
    "steps-by-default": steps_by_default,
    "steps-in-full": steps_in_full,
    "every-workload": every_workload,
    "targets": target_table,
    "nsight-step": nsight_step,
    "nsight-others": nsight_others,
    "selection": selection,
    "selection-long": selection_long,
    "rivals": rivals,
    "cpu-short": cpu_short,
    "cpu-steps": cpu_steps,
    "cpu-targets": cpu_targets,
}


def markdown(table: Table) -> str:
    head, *rows = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def filled(page: str) -> str:
    """The page with every marked table written anew."""
    return re.sub(
        r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)",
        lambda found: f"{found[1]}{markdown(TABLES[found[2]]())}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a table differs")
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page = path.read_text()
        if filled(page) != page:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(filled(page))
    if check and stale:
        sys.exit(f"tables differ from bench/results in {', '.join(map(str, stale))}: run `python bench/tables.py`")


if __name__ == "__main__":
    main()
