"""Profile the kernels with Nsight Compute.

    python bench/nsight.py [--out bench/results/nsight.json]

Runs itself under ncu, which needs permission to read the GPU's counters. Writes a JSON and prints its table, of the
second call of each kernel. Durations exceed those of kernels.py: ncu runs a kernel once for each set of counters, and
flushes the data and instruction caches each time.
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
from kernels import machine
from layers import DEVICE, attend, new_layer, one_call
from nsight_metrics import METRICS
from quest_ops import topk_pages
from rich.console import Console
from rich.table import Table
from workloads import GQA, MHA, TOPK, TopK, Workload

KERNELS = "regex:^(decode_step_kernel|decode_kernel|topk_pages_kernel|topk_best_kernel)"


def calls() -> dict[str, Callable[[], Callable[[], object]]]:
    """The calls to profile: name -> a function that makes inputs of its own and returns the call on them."""

    def step(w: Workload) -> Callable[[], object]:
        layer = new_layer(w)
        return lambda: one_call(w, layer)

    def dense(w: Workload) -> Callable[[], object]:
        layer = new_layer(w)
        return lambda: attend(layer, None)

    def select(w: TopK) -> Callable[[], object]:
        scores = torch.randn(1, w.rows, w.n, device=DEVICE)
        lens = torch.tensor([w.n * 16], dtype=torch.int32, device=DEVICE)
        return lambda: topk_pages(scores, lens, 16, w.k, w.rows)

    long = replace(GQA, context=131072)
    steps = (MHA, replace(MHA, context=131072), GQA, long, replace(GQA, context=524288), replace(GQA, batch=8))
    return {
        **{f"decode_step: {w}": lambda w=w: step(w) for w in steps},
        **{f"dense: {w.heads}/{w.kv_heads}, {w.context}": lambda w=w: dense(w) for w in (MHA, long)},
        **{str(w): lambda w=w: select(w) for w in TOPK},
    }


def run_calls() -> None:
    torch.manual_seed(0)
    for make in calls().values():
        make()()  # loads the kernel's module, which must not be profiled
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
        # topk_best_kernel is the second kernel of one call.
        name = name if function == "topk_best_kernel" else next(names)
        values = {key: f"{kernel[metric]} {units[metric]}".strip() for key, metric in METRICS.items()}
        found.append({"call": name, "kernel": function, **values})
    assert next(names, None) is None, "a call's kernel was not profiled"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", action="store_true", help="make the calls that ncu profiles, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("bench/results/nsight.json"))
    options = parser.parse_args()
    if options.calls:
        run_calls()
        return
    kernels = profile()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "kernels": kernels}, indent=1))
    table = Table("", *(f"{x['call']} ({x['kernel']})" for x in kernels))
    for key, metric in METRICS.items():
        table.add_row(metric, *(str(x[key]) for x in kernels))
    Console(width=250).print(table)


if __name__ == "__main__":
    main()
