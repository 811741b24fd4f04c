"""The kernels against the fastest dense attention at hand and against the read roofline.

    python bench/kernels.py [--quick | --only TEXT ...] [--no-peers] [--out bench/results/kernels.json]

A decode step is append_kv with the bounds, estimate, topk_pages and sparse_decode. It is timed in one call ("pipeline",
by decode_step) and as the four operators ("four"). A decode_step that keeps its pages ("kept") reads no bounds. Each
figure is a share of one CUDA graph over distinct layers, whose bytes exceed five times the L2 cache and whose page
tables are permuted. Dense peers write their new token too. The read roofline ("limit") is the time of one kernel that
reads the same number of contiguous bytes. Every workload is checked for correctness before it is timed. Writes a JSON
and, for whole runs, plots beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from dense_peers import time_peers
from layers import (
    DEVICE,
    append,
    attend,
    check,
    cold_layers,
    dense_step,
    four_operators,
    kept_step,
    one_call,
    score,
    select,
)
from quest_ops import topk_pages
from rich.console import Console
from rich.table import Table
from targets import DENSE, OWN_DENSE, targets
from timing import read_call, time_calls
from workloads import GQA, MHA, TOPK, WITH_TARGETS, TopK, Workload, all_workloads, named


def measure(w: Workload, with_peers: bool, with_flex: bool) -> dict[str, object]:
    torch.cuda.empty_cache()
    layers = cold_layers(w)
    check(w, layers[0])
    scores = [score(w, x) for x in layers]
    pages = [select(w, x) for x in layers]
    kept, odd = [p.clone() for p in pages], torch.ones_like(layers[0].after)
    buffer = torch.zeros(max(w.sparse_bytes, 1 << 30) // 4, dtype=torch.int32, device=DEVICE)
    sink, apart = torch.zeros(1, dtype=torch.int32, device=DEVICE), max(1, buffer.nbytes // w.sparse_bytes)
    reads = [
        read_call(buffer[i * (w.sparse_bytes // 4) :], sink, w.sparse_bytes) for i in range(min(apart, len(layers)))
    ]
    times = {
        "append_kv": time_calls([lambda x=x: append(x) for x in layers]),
        "estimate": time_calls([lambda x=x: score(w, x) for x in layers]),
        "topk_pages": time_calls(
            [
                lambda x=x, s=s: topk_pages(s, x.after, w.page_size, w.selected, w.kv_heads)
                for x, s in zip(layers, scores, strict=True)
            ]
        ),
        "torch.topk": time_calls([lambda s=s: s[:, : w.kv_heads].topk(w.selected) for s in scores]),
        "sparse_decode": time_calls([lambda x=x, p=p: attend(x, p) for x, p in zip(layers, pages, strict=True)]),
        "four": time_calls([lambda x=x: four_operators(w, x) for x in layers]),
        "pipeline": time_calls([lambda x=x: one_call(w, x) for x in layers]),
        "kept": time_calls([lambda x=x, p=p: kept_step(w, x, p, odd) for x, p in zip(layers, kept, strict=True)]),
        "pages=None": time_calls([lambda x=x: (append(x), attend(x, None)) for x in layers]),
        "dense step": time_calls([lambda x=x: dense_step(w, x) for x in layers]),
        "limit": time_calls(reads),
        **(time_peers(w, layers, with_flex) if with_peers else {}),
    }
    dense = min((name for name in times if name in (*OWN_DENSE, *DENSE)), key=lambda name: times[name].median)
    return {
        "workload": {
            **asdict(w),
            "dtype": str(w.dtype),
            "pages": w.pages,
            "selected_pages": w.selected,
            "name": str(w),
        },
        "bytes": {"sparse": w.sparse_bytes, "dense": w.dense_bytes, "bounds": w.bounds_bytes},
        "layers": len(layers),
        "microseconds": {name: asdict(t) for name, t in times.items()},
        "fastest_dense": dense,
        "speedup": times[dense].median / times["pipeline"].median,
        "over_limit": times["pipeline"].median / times["limit"].median,
    }


def measure_topk(w: TopK) -> dict[str, object]:
    """topk_pages by itself, each row from one head's scores, beside torch.topk."""
    count = max(2, math.ceil(5 * torch.cuda.get_device_properties(0).L2_cache_size / (4 * w.rows * w.n)))
    scores = [torch.randn(1, w.rows, w.n, device=DEVICE) for _ in range(count)]
    lens = torch.tensor([w.n * 16], dtype=torch.int32, device=DEVICE)
    expected = scores[0][..., :-1].topk(w.k - 1).indices.sort().values  # and the last page, which is forced
    assert torch.equal(topk_pages(scores[0], lens, 16, w.k, w.rows)[..., :-1], expected.int()), "topk_pages is wrong"
    times = {
        "topk_pages": time_calls([lambda x=x: topk_pages(x, lens, 16, w.k, w.rows) for x in scores]),
        "torch.topk": time_calls([lambda x=x: x.topk(w.k) for x in scores]),
    }
    return {**asdict(w), "microseconds": {name: asdict(t) for name, t in times.items()}}


def machine() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)])
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "copy_TB_per_s": 2 * source.nbytes / copy.median / 1e6,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def print_rows(rows: list[dict[str, object]]) -> None:
    table = Table("heads, context, budget", title="microseconds a layer and decode step: median")
    names = [
        "append_kv",
        "estimate",
        "topk_pages",
        "sparse_decode",
        "four",
        "pipeline",
        "kept",
        "limit",
        "pages=None",
        "dense step",
        *DENSE,
    ]
    headings = {"four": "four operators", "pipeline": "decode_step", "kept": "kept pages", "limit": "read roofline"}
    for name in (*names, "speedup", "x roofline"):
        table.add_column(headings.get(name, name), justify="right")
    for row in rows:
        times = row["microseconds"]
        cells = [f"{times[name]['median']:.1f}" if name in times else "-" for name in names]
        table.add_row(row["workload"]["name"], *cells, f"{row['speedup']:.2f}", f"{row['over_limit']:.2f}")
    Console(width=200).print(table)


def print_targets(result: dict[str, list[dict[str, object]]]) -> None:
    table = Table("", "target", "measured", "")
    for description, target, measured, met in targets(result):
        table.add_row(description, target, measured, "met" if met else "missed")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the workloads that have targets")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only workloads of this name, or with TEXT in it")
    parser.add_argument("--no-peers", action="store_true", help="only this library and the read roofline")
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.json"))
    options = parser.parse_args()

    workloads = WITH_TARGETS if options.quick else all_workloads()
    topk = TOPK
    if options.only:
        try:
            wanted = named([str(w) for w in (*TOPK, *workloads)], options.only)
        except ValueError as error:
            parser.error(str(error))
        workloads, topk = [w for w in workloads if str(w) in wanted], [w for w in TOPK if str(w) in wanted]

    torch.manual_seed(0)
    selections = [measure_topk(w) for w in topk]
    result = {"machine": machine(), "topk": selections, "rows": []}
    for w in workloads:
        # FlexAttention compiles for each shape, and takes 20 times as long as the others: once a head layout.
        result["rows"].append(measure(w, not options.no_peers, with_flex=w in (MHA, GQA)))
        write(result, options.out)
    write(result, options.out)
    print(json.dumps(result["machine"]))
    print_rows(result["rows"])
    if not options.no_peers:
        print_targets(result)
    if not (options.only or options.no_peers):
        from plots import draw

        draw(result, options.out)


def write(result: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
