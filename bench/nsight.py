"""What bounds the kernels, as Nsight Compute counts it: the second, cold call of each.

    python bench/nsight.py [--out bench/results/nsight-h100.json]

Runs itself under ncu, which must be at hand and may count, and writes a JSON and prints its table. Steps take longer
than in kernels.py: ncu empties the caches before each of the passes that a kernel is run in, instructions' among them.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from kernels import DEVICE, Workload, attend, machine, new_layer, pipeline
from quest_ops import topk_pages
from rich.console import Console
from rich.table import Table

KERNELS = "regex:^(decode_step_kernel|decode_kernel|topk_pages_kernel|topk_best_kernel)"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "duration": "gpu__time_duration.sum",
    "clock of the multiprocessors": "smsp__cycles_elapsed.avg.per_second",
    "blocks": "launch__grid_size",
    "registers a thread": "launch__registers_per_thread",
    "read from DRAM": "dram__bytes_read.sum",
    "DRAM bandwidth used": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps there, of those that fit": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions of warps": "smsp__inst_executed.sum",
    "a scheduler's cycles with an instruction": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "cycles from one instruction of a warp to the next": "smsp__average_warp_latency_per_inst_issued.ratio",
    "waiting: at a barrier": STALL.format("barrier"),
    "waiting: for device memory": STALL.format("long_scoreboard"),
    "waiting: for shared memory": STALL.format("short_scoreboard"),
    "waiting: for instructions to arrive": STALL.format("no_instruction"),
    "waiting: for the instruction before": STALL.format("wait"),
    "waiting: for room among memory's requests": STALL.format("lg_throttle"),
    "waiting: for room among shared memory's": STALL.format("mio_throttle"),
    "waiting: for a turn": STALL.format("not_selected"),
}


def calls() -> dict[str, Callable[[], Callable[[], object]]]:
    """What is profiled: of each, how to make a call with inputs of its own."""
    mha, gqa = Workload(32, 32, 32768, 2048), Workload(32, 8, 32768, 2048)

    def step(w: Workload) -> Callable[[], object]:
        layer = new_layer(w)
        return lambda: pipeline(w, layer)

    def dense(w: Workload) -> Callable[[], object]:
        layer = new_layer(w)
        return lambda: attend(layer, None)

    def select(n: int, k: int) -> Callable[[], object]:
        scores, lens = torch.randn(1, 32, n, device=DEVICE), torch.tensor([n * 16], dtype=torch.int32, device=DEVICE)
        return lambda: topk_pages(scores, lens, 16, k, 32)

    long = replace(gqa, context=131072)
    steps = (mha, replace(mha, context=131072), gqa, long, replace(gqa, context=524288), replace(gqa, batch=8))
    return {
        **{f"decode_step: {w}": lambda w=w: step(w) for w in steps},
        **{f"dense: {w.heads}/{w.kv_heads}, {w.context}": lambda w=w: dense(w) for w in (mha, long)},
        **{f"topk_pages: 32 x {n}, {k}": lambda n=n, k=k: select(n, k) for n, k in ((2048, 128), (65536, 256))},
    }


def run_calls() -> None:
    torch.manual_seed(0)
    for make in calls().values():
        make()()  # loads the module
        call = make()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def profile() -> list[dict[str, object]]:
    command = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none", "-k", KERNELS]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, __file__, "--calls"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [line for line in output.splitlines() if line.startswith('"')]
    units, *kernels = csv.DictReader(lines)
    names, found = iter(calls()), []
    name = ""
    for kernel in kernels:
        function = kernel["Kernel Name"].split("(")[0].split("<")[0].removeprefix("void ").split("::")[-1]
        name = name if function == "topk_best_kernel" else next(names)
        values = {what: f"{kernel[metric]} {units[metric]}".strip() for what, metric in METRICS.items()}
        found.append({"call": name, "kernel": function, **values})
    assert next(names, None) is None, "a call's kernel was not profiled"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", action="store_true", help="make the calls: what ncu runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results/nsight.json"))
    options = parser.parse_args()
    if options.calls:
        run_calls()
        return
    kernels = profile()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "kernels": kernels}, indent=1))
    table = Table("", *(f"{x['call']} ({x['kernel']})" for x in kernels))
    for what in METRICS:
        table.add_row(what, *(str(x[what]) for x in kernels))
    Console(width=250).print(table)


if __name__ == "__main__":
    main()
