"""Every CUDA kernel under compute-sanitizer, on small shapes, and the fuzzer's corrupt numbers under memcheck.

    make sanitize-gpu ARGS="--out tests/reliability/sanitize-gpu.json"
    make sanitize-gpu ARGS="--checks racecheck --minutes 8"

Each check is a process of its own. It makes as many of the cases as its time allows, in an order that spreads over the
kernels. The last line is a JSON summary with the cases made. The exit status is 1 where a check reports an error,
a process fails, or a case is left out. No cached memory is used, so that each tensor has bounds that memcheck knows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fuzz import judge, plans
from helpers.operator_cases import HEAD_DIMS, KINDS, LAYOUTS, PAGE_SIZES, Case, Kind, Shape, place
from helpers.steps import before_step, four_steps, on, one_step
from quest_ops import ops
from quest_ops._library import OPERATORS

Call = Callable[[], object]
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck", "corrupt")
HALF = (torch.float16, torch.bfloat16)
MAIN_KINDS = ("minmax", "minmax-8-bit", "mean-std-4-bit")  # a kind for each type of bounds
LENGTHS = (300, 37, 1)  # 3 tiles of tokens, so that partials are combined
ERROR = 86


def kernels() -> dict[str, Call]:
    """A call or two of each instantiation, by name."""
    cases: dict[str, Call] = {}

    def add(name: str, *arguments: Any, call: Callable[..., object] = steps, **options: Any) -> None:
        cases[name] = lambda: call(*arguments, **options)

    for i, (D, kind, dtype) in enumerate(itertools.product(HEAD_DIMS, MAIN_KINDS, (*HALF, torch.float32))):
        page_size = PAGE_SIZES[i % len(PAGE_SIZES)]
        shape = Shape(dtype, D, page_size, 2, 4, lengths=LENGTHS, kind=KINDS[kind], seed=i)
        add(f"steps {str(dtype)[6:]} {D} {kind}", shape, max(2, 256 // page_size))
    for dtype, kind in itertools.product((*HALF, torch.float32), KINDS):
        unaligned = Shape(dtype, 80, 16, 2, 4, 2, (300, 37, 2), layouts=(3, 3, 3, 3), kind=KINDS[kind])
        add(f"unaligned {str(dtype)[6:]} {kind}", unaligned, 16, group_reduce="soft")
        add(f"bounds {str(dtype)[6:]} {kind}", dtype, KINDS[kind], call=bounds)
    for T, group, reduce in itertools.product((1, 8), (1, 7, 16), ("none", "max", "sum", "soft")):
        shape = Shape(torch.bfloat16, 128, 16, 2, group, T, (300, 37, 8), seed=T)
        news = (T, 0, min(T, 3))
        add(f"ragged {T} {group} {reduce}", shape, 5, news=news, group_reduce=reduce, sink_pages=1)
    for i, (dtype, page_size) in enumerate(itertools.product((*HALF, torch.float32), PAGE_SIZES)):
        j = i + i // len(PAGE_SIZES)
        kind, group, T = MAIN_KINDS[j % 3], (4, 12)[i // 2 % 2], (0, 8)[j % 2]
        shape = Shape(dtype, 64, page_size, 2, group, T, (300, 37, 8), kind=KINDS[kind], seed=i // 2)
        add(f"dense below {str(dtype)[6:]} {page_size}", shape, 2, dense_below=40)  # one sequence selects
    for i, (dtype, D, layout) in enumerate(itertools.product((*HALF, torch.float32), HEAD_DIMS, (0, 3))):
        shape = Shape(dtype, D, PAGE_SIZES[i % len(PAGE_SIZES)], 2, 4, 1, LENGTHS, layouts=(layout,) * 4, seed=i)
        add(f"codes {str(dtype)[6:]} {D} {LAYOUTS[layout]}", shape, "max", call=codes)
    for T, group, reduce in itertools.product((1, 8), (1, 7, 16), ops.TOKEN_REDUCE):
        for dtype in (torch.bfloat16, torch.float32):  # with and without tensor cores
            shape = Shape(dtype, 128, 16, 2, group, T, (300, 37, 8), seed=T)
            add(f"codes {str(dtype)[6:]} {T} {group} {reduce}", shape, reduce, (T, 0, min(T, 3)), call=codes)
    for name, rows, pages, k in (
        ("few", 1, 90, 5),
        ("many", 300, 90, 5),
        ("split", 1, 70_000, 9),
        ("long", 1, 20_000, 9000),
    ):
        for reduce in ("none", "max", "soft"):
            add(f"topk {name} {reduce}", rows, pages, k, reduce, call=topk)
    return cases


def steps(shape: Shape, num_pages: int, news: tuple[int, ...] | None = None, **options: Any) -> None:
    """decode_step, the four operators, and dense attention in one call and alone."""
    case = before_step(shape, news)
    budgets = None if news is None else torch.tensor([num_pages, 2, 1], dtype=torch.int32, device="cuda")
    y = on(case, "cuda")
    counters = ops.new_counters(len(shape.lengths), shape.kv_heads, "cuda") if shape.seed % 2 == 0 else None
    xs = [on(case, "cuda") for _ in range(1 if counters is None else 2)]  # an even and an odd step of the counters
    ones = [one_step(x, num_pages, budgets=budgets, counters=counters, **options) for x in xs]
    four = four_steps(y, num_pages, budgets=budgets, **options)
    dense = ops.sparse_decode(*y.attention, new_lens=y.new_lens)
    every_page = one_step(on(case, "cuda"), 0, counters=counters, **options)
    pairs = [*zip(every_page, dense, strict=False), *((a, b) for one in ones for a, b in zip(one, four, strict=True))]
    for a, b in pairs:
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    if news is not None or shape.new_tokens > 1 or options.get("recent_pages", 1) == 0:
        return
    selected = four[2]
    kept = torch.full((*selected.shape[:1], *selected.shape[-2:]), -1, dtype=torch.int32, device="cuda")
    numbers = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    for kept_steps in (numbers[:1].expand(3).contiguous(), numbers, numbers):  # a step that selects, two that keep
        lists = {"kept_pages": kept, "kept_steps": kept_steps, "reselect_every": 2}
        one_step(on(case, "cuda"), num_pages, counters=counters, **lists, **options)
        assert torch.equal(kept, selected.view_as(kept))


def bounds(dtype: torch.dtype, kind: Kind) -> None:
    x = Case(Shape(dtype, 64, 16, 2, 1, lengths=LENGTHS, kind=kind)).on("cuda")
    where = (x.k_cache, x.k_bounds, x.page_table, x.seq_lens)
    for first in (None, torch.tensor([20, 0, 5], dtype=torch.int32, device="cuda")):
        ops.update_bounds(*where, first, x.k_scales, kind.std_factor)


def codes(shape: Shape, token_reduce: Any, news: tuple[int, ...] | None = None) -> None:
    """append_codes of a prompt and of a step, and rerank_pages by lists of the KV heads and of the query heads."""
    case = before_step(shape, news)
    x, layout = on(case, "cuda"), LAYOUTS[shape.layouts[1]]
    N, Hkv, S, D = case.k_cache.shape
    k_codes = place(torch.zeros(N, Hkv, S, D // 4, dtype=torch.uint8), layout, "cuda")
    code_scales = place(torch.full((N, Hkv, S), math.nan), layout, "cuda")
    prompt = torch.nn.utils.rnn.pad_sequence(case.keys, batch_first=True).to("cuda")
    to = (k_codes, code_scales, x.page_table)
    ops.append_codes(prompt, *to, torch.zeros_like(x.start_lens), x.start_lens)
    ops.append_codes(x.k, *to, x.start_lens, x.new_lens)
    for per_head in (False, True):  # lists of more tokens than a block takes
        pages = place(case.random_pages(640 // S, per_head, shuffled=True), layout, "cuda")
        scores = ops.rerank_pages(x.q, *to, x.seq_lens, pages, token_reduce, 0.125, x.new_lens)
        assert not scores.isnan().any()  # the scale of a token that is not in the cache


def topk(rows: int, pages: int, k: int, reduce: Any) -> None:
    scores = torch.randn(rows, 2, pages, generator=torch.Generator().manual_seed(pages)).cuda()
    lens = torch.full((rows,), pages * 16, dtype=torch.int32, device="cuda")
    ops.topk_pages(scores, lens, 16, k, 1, reduce, 1, 1, 0.125)


def corrupt() -> dict[str, Call]:
    """Numbers of any 32 bits in page tables, lengths and lists, as the fuzzer makes and judges them."""
    drawn = [
        plans.draw(f"sanitize-{i}", operator, "corrupt") for i in range(400) for operator in OPERATORS
    ]  # an operator after the other
    return {f"{plan['operator']} {i}": lambda plan=plan: judge.run(plan, "cuda") for i, plan in enumerate(drawn)}


def inside(check: str, minutes: float) -> None:
    """The cases, in this process, which runs under the check."""
    end = time.monotonic() + 60 * minutes
    warnings.filterwarnings("ignore", category=UserWarning)
    cases = list((corrupt() if check == "corrupt" else kernels()).items())
    if check != "corrupt":
        random.Random(0).shuffle(cases)
    made = 0
    for name, call in cases:
        if time.monotonic() > end:
            break
        try:
            call()
            torch.cuda.synchronize()
        except Exception:
            print(f"case: {name}", flush=True)
            raise
        made += 1
    print(f"CASES {made} of {len(cases)}", flush=True)


def outside(check: str, minutes: float, extra: list[str]) -> dict[str, Any]:
    """Run one check. Its process gets three minutes more, to start and to report."""
    tool = "memcheck" if check == "corrupt" else check
    command = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--tool", tool]
    command += ["--error-exitcode", str(ERROR), "--print-limit", "20", *extra]
    command += [sys.executable, __file__, "--inside", check, "--minutes", str(minutes)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, text=True, check=False, timeout=60 * (minutes + 3),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as stopped:
        output, status = (stopped.stdout or b"").decode(errors="replace"), -1
    cases = re.search(r"CASES (\d+) of (\d+)", output)
    errors = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    total = next((int(n) for n in errors.groups() if n is not None), None) if errors else None
    if status != 0:
        print(output[-6000:], flush=True)
    return {
        "status": status,
        "errors": total,
        "cases": int(cases[1]) if cases else 0,
        "of": int(cases[2]) if cases else None,
        "seconds": round(time.monotonic() - start),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make sanitize-gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--minutes", type=float, default=4, help="of each check")
    parser.add_argument("--tool-args", default="", help="more arguments of compute-sanitizer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", choices=(*CHECKS, "none"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, options.minutes)
        return 0
    summary: dict[str, Any] = {
        "command": "make sanitize-gpu ARGS='" + " ".join(sys.argv[1:]) + "'",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "checks": {},
    }
    for check in options.checks:
        summary["checks"][check] = outside(check, options.minutes, options.tool_args.split())
        print(f"{check}: {summary['checks'][check]}", flush=True)
    text = json.dumps(summary, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    checks = summary["checks"].items()
    # The fuzzer makes as many cases as its time allows; the kernels must all have run.
    good = all(x["status"] == 0 and (check == "corrupt" or x["cases"] == x["of"]) for check, x in checks)
    return not good


if __name__ == "__main__":
    sys.exit(main())
