"""The kernels against the fastest dense attention at hand and against the time of reading the same bytes.

    python bench/kernels.py [--quick] [--out bench/results/kernels.json]

A decode step pays for append_kv with the bounds, estimate, topk_pages and sparse_decode: by decode_step ("pipeline") or
by the four operators ("four"). Each is timed as one CUDA graph over so many distinct layers that the bytes it touches
are over five times the L2 cache, with permuted page tables. Dense peers write their new token too. Every figure is
checked for correctness before it is timed. Writes a JSON and, beside it, plots.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from plots import draw
from quest_ops import append_kv, decode_step, estimate, reference, sparse_decode, topk_pages, update_bounds
from rich.console import Console
from rich.table import Table
from timing import Timing, read_call, time_calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda"
SPARE_MEMORY = 0.8  # of the GPU's free memory, for the inputs of one workload
COPIES = 2.2  # of the keys and values of a layer: the pages, what dense peers read, and the rest


@dataclass(frozen=True)
class Workload:
    """One decode step of one layer. budget: tokens; None reads everything through the same pipeline."""

    heads: int
    kv_heads: int
    context: int
    budget: int | None
    batch: int = 1
    page_size: int = 16
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    selection: str = "random"
    bounds: str = "int8"

    @property
    def pages(self) -> int:
        return self.context // self.page_size

    @property
    def selected(self) -> int:
        return self.pages if self.budget is None else min(self.pages, self.budget // self.page_size)

    @property
    def row_bytes(self) -> int:
        return self.batch * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bounds_bytes(self) -> int:
        if self.bounds == "int8":  # and a float32 scale a page and head
            return self.batch * self.pages * self.kv_heads * (2 * self.head_dim + 4)
        return 2 * self.pages * self.row_bytes

    @property
    def sparse_bytes(self) -> int:
        """Bounds of all pages, keys and values of the selected ones."""
        return self.bounds_bytes + 2 * self.selected * self.page_size * self.row_bytes

    @property
    def dense_bytes(self) -> int:
        return 2 * self.context * self.row_bytes

    def __str__(self) -> str:
        extra = [f"page {self.page_size}"] * (self.page_size != 16) + [f"D {self.head_dim}"] * (self.head_dim != 128)
        extra += ["16-bit bounds"] * (self.bounds != "int8")
        extra += ["fp16"] * (self.dtype == torch.float16) + [self.selection] * (self.selection != "random")
        budget = "all" if self.budget is None else str(self.budget)
        return ", ".join([f"{self.heads}/{self.kv_heads} B {self.batch}, {self.context}, {budget}", *extra])


def layers_that_fit(w: Workload) -> int:
    return int(torch.cuda.mem_get_info()[0] * SPARE_MEMORY / (COPIES * w.dense_bytes))


def largest_context(w: Workload) -> Workload:
    """The longest of which two layers fit, a power of two."""
    return replace(w, context=1 << int(math.log2(layers_that_fit(replace(w, context=1)) / 2)))


def workloads(quick: bool) -> list[Workload]:
    mha, gqa = Workload(32, 32, 32768, 2048), Workload(32, 8, 32768, 2048)
    targets = [
        mha,
        replace(mha, context=131072),
        gqa,
        replace(gqa, context=131072),
        replace(gqa, batch=8),
    ]
    if quick:
        return targets
    more = [replace(w, context=c) for w in (mha, gqa) for c in (2048, 8192)]
    more += [replace(gqa, context=524288), replace(gqa, context=8192, batch=32), replace(gqa, batch=32)]
    more += [replace(w, budget=b) for w in (mha, gqa) for b in (512, 1024, 4096)]
    more += [replace(gqa, context=c, budget=None) for c in (2048, 8192, 32768)]
    more += [replace(gqa, page_size=s) for s in (32, 64)]
    more += [replace(w, page_size=8, context=c) for w in (mha, gqa) for c in (32768, 131072)]
    more += [replace(w, bounds="16-bit") for w in targets]
    more += [replace(gqa, dtype=torch.float16), replace(gqa, head_dim=64), replace(gqa, selection="clustered")]
    return [*targets, *more, largest_context(gqa)]


@dataclass
class Layer:
    """The inputs of one call."""

    q: Tensor
    k_new: Tensor
    v_new: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor
    k_scales: Tensor | None  # with 8-bit bounds
    page_table: Tensor
    before: Tensor  # [B] tokens before the step
    after: Tensor  # [B] tokens with the new one


def new_layer(w: Workload) -> Layer:
    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=w.dtype)

    N = w.batch * w.pages
    k_cache, v_cache = (randn(N, w.kv_heads, w.page_size, w.head_dim) for _ in range(2))
    page_table = torch.randperm(N, device=DEVICE).int().view(w.batch, w.pages)
    q = randn(w.batch, w.heads, w.head_dim)
    if w.selection == "clustered":  # the pages that score high are neighbours
        towards = q.view(w.batch, w.kv_heads, -1, w.head_dim).mean(2)
        position = torch.arange(w.pages, device=DEVICE) / w.pages
        height = (-(((position - 0.4) / 0.05) ** 2)).exp().to(w.dtype)
        for b in range(w.batch):
            k_cache[page_table[b].long()] += height[:, None, None, None] * towards[b][None, :, None]
    int8 = w.bounds == "int8"
    k_bounds = torch.empty(N, w.kv_heads, 2, w.head_dim, device=DEVICE, dtype=torch.int8 if int8 else w.dtype)
    k_scales = torch.empty(N, w.kv_heads, device=DEVICE) if int8 else None
    after = torch.full((w.batch,), w.context - 3, dtype=torch.int32, device=DEVICE)
    update_bounds(k_cache, k_bounds, page_table, after, k_scales=k_scales)
    new = (randn(w.batch, 1, w.kv_heads, w.head_dim) for _ in range(2))
    return Layer(q, *new, k_cache, v_cache, k_bounds, k_scales, page_table, after - 1, after)


def append(x: Layer) -> None:
    append_kv(x.k_new, x.v_new, x.k_cache, x.v_cache, x.k_bounds, x.page_table, x.before, k_scales=x.k_scales)


def score(w: Workload, x: Layer) -> Tensor:
    return estimate(x.q, x.k_bounds, x.page_table, x.after, w.page_size, x.k_scales)


def select(w: Workload, x: Layer) -> Tensor:
    return topk_pages(score(w, x), x.after, w.page_size, w.selected, w.kv_heads)


def attend(x: Layer, pages: Tensor | None) -> Tensor:
    return sparse_decode(x.q, x.k_cache, x.v_cache, x.page_table, x.after, pages)[0]


def four(w: Workload, x: Layer) -> Tensor:
    append(x)
    return attend(x, select(w, x))


def pipeline(w: Workload, x: Layer) -> Tensor:
    caches = (x.k_cache, x.v_cache, x.k_bounds)
    lengths = (x.page_table, x.before, x.after)
    return decode_step(x.q, x.k_new, x.v_new, *caches, *lengths, w.selected, k_scales=x.k_scales)[0]


def check(w: Workload, x: Layer) -> None:
    """The pipeline's output for one sequence and KV head against float64, and the dense mode against PyTorch's."""
    out, pages = pipeline(w, x), select(w, x)
    assert torch.equal(out, four(w, x)), f"{w}: decode_step differs from the four operators"
    group, dense = w.heads // w.kv_heads, attend(x, None)
    b, h = w.batch - 1, w.kv_heads - 1
    heads = slice(h * group, (h + 1) * group)
    one = [x.q[b : b + 1, heads], x.k_cache[:, h : h + 1], x.v_cache[:, h : h + 1], x.page_table[b : b + 1]]
    exact = reference.sparse_decode(*one, x.after[b : b + 1], pages[b : b + 1, h : h + 1])[0]
    close = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[w.dtype]
    error = ((out[b, heads].double() - exact[0]).norm() / exact.norm()).item()
    assert error < close, f"{w}: the pipeline is off by {error:.2g}"
    bounds = x.k_bounds[:, h : h + 1].double()
    if x.k_scales is not None:
        bounds *= x.k_scales[:, h : h + 1, None, None]
    scores = reference.estimate(one[0], bounds, one[3], x.after[b : b + 1], w.page_size)
    best = scores[0].amax(0)[pages[b, h].long()].sort().values[1:]  # the last page is forced
    rest = scores[0].amax(0).scatter(0, pages[b, h].long(), -math.inf).max()
    assert best[0] >= rest - 1e-3 * rest.abs(), f"{w}: a page was passed over"
    if w.selected == w.pages:
        assert torch.equal(out, dense), f"{w}: all pages are not the dense result"


def contiguous(w: Workload, x: Layer) -> tuple[Tensor, Tensor]:
    """The same keys and values as a dense kernel likes them, [B, Hkv, L, D], with the tokens of the step."""
    k, v = (
        cache[x.page_table.long()].transpose(1, 2).reshape(w.batch, w.kv_heads, w.context, w.head_dim)
        for cache in (x.k_cache, x.v_cache)
    )
    return k[:, :, : w.context - 3], v[:, :, : w.context - 3]


def peers(w: Workload) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """Dense attention of one token by whatever is at hand: (q [B, Hq, 1, D], k, v) -> out."""
    gqa = w.heads != w.kv_heads
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

        yield name, sdpa
    with contextlib.suppress(ImportError):
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        yield "FlexAttention", lambda q, k, v: compiled(q, k, v, enable_gqa=gqa)
    with contextlib.suppress(ImportError):
        import flashinfer

        def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flashinfer.single_decode_with_kv_cache(q[0, :, 0], k[0], v[0], kv_layout="HND")[None, :, None]

        if w.batch == 1:
            yield "FlashInfer", single


def time_peers(w: Workload, layers: list[Layer], with_flex: bool) -> dict[str, Timing]:
    caches, times = [contiguous(w, x) for x in layers], {}
    for name, run in peers(w):
        if name == "FlexAttention" and not with_flex:
            continue

        def step(x: Layer, kv: tuple[Tensor, Tensor], run: Callable[..., Tensor] = run) -> Tensor:
            for cache, new in zip(kv, (x.k_new, x.v_new), strict=True):
                cache[:, :, -1].copy_(new[:, 0])
            return run(x.q[:, :, None], *kv)

        try:
            out = step(layers[0], caches[0])[:, :, 0]
            append(layers[0])
            off = ((out - attend(layers[0], None)).float().norm() / out.float().norm()).item()
            assert off < 2e-2, f"{w}: {name} and the dense mode differ by {off:.2g}"
            times[name] = time_calls([lambda x=x, kv=kv: step(x, kv) for x, kv in zip(layers, caches, strict=True)])
        except RuntimeError as error:  # a backend that does not take this shape
            print(f"{w}: {name} does not run: {str(error).splitlines()[0][:100]}")
    return times


def layers_for(w: Workload) -> list[Layer]:
    """So many that the pipeline touches over five times the L2 cache, and memory holds them and their copies."""
    cold = 5 * torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(64, math.ceil(cold / w.sparse_bytes), layers_that_fit(w)))
    return [new_layer(w) for _ in range(count)]


def measure(w: Workload, with_flex: bool) -> dict[str, object]:
    torch.cuda.empty_cache()
    layers = layers_for(w)
    check(w, layers[0])
    scores = [score(w, x) for x in layers]
    pages = [select(w, x) for x in layers]
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
        "four": time_calls([lambda x=x: four(w, x) for x in layers]),
        "pipeline": time_calls([lambda x=x: pipeline(w, x) for x in layers]),
        "pages=None": time_calls([lambda x=x: (append(x), attend(x, None)) for x in layers]),
        "limit": time_calls(reads),
        **time_peers(w, layers, with_flex),
    }
    dense = min((name for name in times if name in ("pages=None", *DENSE)), key=lambda name: times[name].median)
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


DENSE = ("cuDNN", "flash", "FlexAttention", "FlashInfer")


def measure_topk(rows: int, n: int, k: int) -> dict[str, object]:
    """topk_pages of ``rows`` lists by themselves, each from one head's scores, beside torch.topk."""
    count = max(2, math.ceil(5 * torch.cuda.get_device_properties(0).L2_cache_size / (4 * rows * n)))
    scores = [torch.randn(1, rows, n, device=DEVICE) for _ in range(count)]
    lens = torch.tensor([n * 16], dtype=torch.int32, device=DEVICE)
    expected = scores[0][..., :-1].topk(k - 1).indices.sort().values  # and the last page, which is forced
    assert torch.equal(topk_pages(scores[0], lens, 16, k, rows)[..., :-1], expected.int()), "topk_pages is wrong"
    times = {
        "topk_pages": time_calls([lambda x=x: topk_pages(x, lens, 16, k, rows) for x in scores]),
        "torch.topk": time_calls([lambda x=x: x.topk(k) for x in scores]),
    }
    return {"rows": rows, "n": n, "k": k, "microseconds": {name: asdict(t) for name, t in times.items()}}


def targets(result: dict[str, list[dict[str, object]]]) -> list[tuple[str, str, str, bool]]:
    """What was aimed at: (what, target, measured, met)."""
    rows = {row["workload"]["name"]: row for row in result["rows"]}

    def time(row: dict[str, object], name: str) -> float:
        return row["microseconds"][name]["median"]

    found: list[tuple[str, str, str, bool]] = []

    def at_most(what: str, most: float, values: list[float], unit: str) -> None:
        if values:
            spread = f"{min(values):.2f}" if len(values) == 1 else f"{min(values):.2f} to {max(values):.2f}"
            found.append((what, f"at most {most:g}{unit}", spread + unit, max(values) <= most))

    mha, gqa = Workload(32, 32, 32768, 2048), Workload(32, 8, 32768, 2048)
    speedups = ((mha, 8), (replace(mha, context=131072), 16), (gqa, 5), (replace(gqa, context=131072), 13))
    for w, least in (*speedups, (replace(gqa, batch=8), 8)):
        if str(w) in rows:
            speedup = rows[str(w)]["speedup"]
            found.append((f"{w}: over the fastest dense", f"at least {least}x", f"{speedup:.2f}x", speedup >= least))
    selects = [row for row in rows.values() if row["workload"]["budget"] and row["workload"]["context"] > 8192]
    large = [row for row in selects if row["bytes"]["sparse"] >= 64 << 20]
    at_most("step over the limit, 64 MiB and more", 1.25, [row["over_limit"] for row in large], "x")
    small = [row for row in selects if row["bytes"]["sparse"] < 64 << 20]
    at_most("step above the limit, less", 5, [time(row, "pipeline") - time(row, "limit") for row in small], " us")
    for row, most in zip(result["topk"], (3, 8), strict=True):
        at_most(f"topk_pages, {row['rows']} rows, n {row['n']}, k {row['k']}", most, [time(row, "topk_pages")], " us")
    dense = [row for row in rows.values() if row["workload"]["context"] >= 8192]
    peers = [time(row, "pages=None") / min(time(row, x) for x in DENSE if x in row["microseconds"]) for row in dense]
    at_most("dense mode over the fastest dense, 8K and longer", 1.05, peers, "x")
    whole = [row for row in rows.values() if row["workload"]["selected_pages"] == row["workload"]["pages"]]
    ratios = [time(row, "pipeline") / time(row, "pages=None") for row in whole]
    at_most("budget >= context, over our dense mode", 1.03, ratios, "x")
    return found


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


def print_table(rows: list[dict[str, object]]) -> None:
    table = Table("heads, context, budget", title="microseconds a layer and decode step: median")
    names = ["append_kv", "estimate", "topk_pages", "sparse_decode", "four", "pipeline", "limit", "pages=None", *DENSE]
    for name in (*names, "speedup", "x limit"):
        table.add_column(name, justify="right")
    for row in rows:
        times = row["microseconds"]
        cells = [f"{times[name]['median']:.1f}" if name in times else "-" for name in names]
        table.add_row(row["workload"]["name"], *cells, f"{row['speedup']:.2f}", f"{row['over_limit']:.2f}")
    Console(width=200).print(table)


def print_targets(result: dict[str, list[dict[str, object]]]) -> None:
    table = Table("what", "target", "measured", "")
    for what, target, measured, met in targets(result):
        table.add_row(what, target, measured, "met" if met else "missed")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the workloads that have targets")
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    topk = [measure_topk(32, 2048, 128), measure_topk(32, 65536, 256)]
    result = {"machine": machine(), "topk": topk, "rows": []}
    for i, w in enumerate(workloads(options.quick)):
        # FlexAttention compiles for each shape, and takes 20 times as long as the others: once a head layout.
        result["rows"].append(measure(w, with_flex=i in (0, 2)))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["machine"]))
    print_table(result["rows"])
    print_targets(result)
    draw(result, options.out)


if __name__ == "__main__":
    main()
