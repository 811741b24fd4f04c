"""The CPU kernels against dense attention on the CPU, and against the time to read the same bytes.

    python bench/cpu.py [--only TEXT ...] [--seconds 3] [--out bench/results/cpu.json]

Everything of a workload is timed in rounds, each of which makes one call of each kind. So a slow minute of the machine
meets all alike. A figure is the median of the rounds, with the quartiles beside it. With one thread it is the time of
that thread on the processor, with two it is that of the clock. Calls go through distinct layers, whose bytes exceed
512 MiB together where 8 layers do. The smallest workload, 16 pages, is timed in the cache by 20 calls in a row.
The step is decode_step: it writes the token, scores, selects and attends. The dense kernels only attend.

vLLM's kernel is timed where its package for the CPU is installed, and FlexAttention at 32K tokens, as it compiles for
each shape. Writes a JSON and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from quest_ops import build_info, ops
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PAGE, HEAD_DIM, BUDGET = 16, 128, 2048
VLLM_BLOCK = 128
COLD_BYTES = 1 << 29
MOST_LAYERS, MOST_BYTES = 8, 1.2 * 2**30  # of keys and values a layer
SDPA, FLEX, VLLM, DENSE, STEP = "torch SDPA", "FlexAttention", "vLLM", "dense mode", "decode_step"
PARTS = ("estimate", "topk_pages", "sparse_decode")

Call = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    heads: int
    kv_heads: int
    batch: int
    context: int
    dtype: str
    threads: int
    budget: int = BUDGET

    @property
    def selected(self) -> int:
        return min(self.budget, self.context) // PAGE

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, all sequences and KV heads."""
        return 2 * self.batch * self.kv_heads * HEAD_DIM * getattr(torch, self.dtype).itemsize

    @property
    def bytes(self) -> dict[str, int]:
        bounds = self.batch * self.context // PAGE * self.kv_heads * (2 * HEAD_DIM + 4)
        selected = self.selected * PAGE * self.token_bytes
        return {"estimate": bounds, "sparse_decode": selected, STEP: bounds + selected, DENSE: self.dense_bytes}

    @property
    def dense_bytes(self) -> int:
        return self.context * self.token_bytes

    @property
    def cached(self) -> bool:
        """So small that it is timed in the cache, by many calls in a row."""
        return self.context < BUDGET

    @property
    def calls(self) -> int:
        return 20 if self.cached else 1

    @property
    def layers(self) -> int:
        if self.cached:
            return 1
        return max(1, min(MOST_LAYERS, math.ceil(COLD_BYTES / self.dense_bytes)))

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} B {self.batch}"
        return f"{heads}, {self.context}, {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"


def all_workloads() -> list[Workload]:
    shapes = [(32, 8, 1), (32, 8, 4), (32, 32, 1), (32, 32, 4)]
    return [
        Workload(*shape, context, dtype, threads)
        for context in (256, 2048, 8192, 32768, 131072)
        for shape in (shapes if context > 256 else shapes[:1])
        for dtype in ("bfloat16", "float32")
        for threads in (1, 2)
    ]


@dataclass
class Layer:
    """One layer's paged cache, and the contiguous keys and values of the dense kernels."""

    q: Tensor
    new: tuple[Tensor, Tensor]
    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor
    k_scales: Tensor
    page_table: Tensor
    before: Tensor
    after: Tensor
    contiguous: tuple[Tensor, Tensor]
    scores: Tensor = field(init=False)
    pages: Tensor = field(init=False)


def random_tokens(w: Workload, seed: int) -> Tensor:
    """[B, Hkv, context, D]: 2048 random tokens a head, repeated, as the time to draw them would be the longest."""
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, w.dtype)
    few = torch.randn(w.batch, w.kv_heads, min(2048, w.context), HEAD_DIM, generator=random).to(dtype)
    return few.repeat(1, 1, w.context // few.shape[2], 1)


def make_layer(w: Workload, seed: int) -> Layer:
    random = torch.Generator().manual_seed(seed)
    N = w.batch * w.context // PAGE
    table = torch.randperm(N, generator=random).int().view(w.batch, -1)
    k, v = random_tokens(w, 2 * seed), random_tokens(w, 2 * seed + 1)

    def paged(x: Tensor) -> Tensor:
        cache = torch.empty(N, w.kv_heads, PAGE, HEAD_DIM, dtype=x.dtype)
        pages = x.view(w.batch, w.kv_heads, -1, PAGE, HEAD_DIM).transpose(1, 2)
        for b in range(w.batch):
            cache[table[b].long()] = pages[b]
        return cache

    k_cache, v_cache = paged(k), paged(v)
    after = torch.full((w.batch,), w.context, dtype=torch.int32)
    bounds = torch.zeros(N, w.kv_heads, 2, HEAD_DIM, dtype=torch.int8), torch.zeros(N, w.kv_heads)
    ops.update_bounds(k_cache, bounds[0], table, after, k_scales=bounds[1])
    q = torch.randn(w.batch, w.heads, HEAD_DIM, generator=random).to(k.dtype)
    new = k[:, :, -1:].transpose(1, 2).contiguous(), v[:, :, -1:].transpose(1, 2).contiguous()
    layer = Layer(q, new, k_cache, v_cache, *bounds, table, after - 1, after, (k, v))
    layer.scores = estimate(layer)
    layer.pages = select(w, layer)
    return layer


def estimate(x: Layer) -> Tensor:
    return ops.estimate(x.q, x.k_bounds, x.page_table, x.after, PAGE, x.k_scales)


def select(w: Workload, x: Layer) -> Tensor:
    return ops.topk_pages(x.scores, x.after, PAGE, w.selected, w.kv_heads)


def attend(x: Layer, pages: Tensor | None) -> Tensor:
    return ops.sparse_decode(x.q, x.k_cache, x.v_cache, x.page_table, x.after, pages)[0]


def step(w: Workload, x: Layer) -> object:
    caches = (x.k_cache, x.v_cache, x.k_bounds, x.page_table)
    return ops.decode_step(x.q, *x.new, *caches, x.before, x.after, w.selected, k_scales=x.k_scales)


def sdpa(w: Workload, x: Layer) -> Tensor:
    k, v = x.contiguous
    return scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=w.heads != w.kv_heads)[:, :, 0]


def flex(w: Workload) -> Callable[[Layer], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def call(x: Layer) -> Tensor:
        return compiled(x.q[:, :, None], *x.contiguous, enable_gqa=w.heads != w.kv_heads)[:, :, 0]

    return call


class VllmCaches:
    """Each layer as vLLM holds it, in blocks of 128 tokens. Raises ImportError where the package is missing."""

    def __init__(self, w: Workload, layers: list[Layer]):
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops, self.layers, self.caches = _custom_ops, layers, []
        self.isa = _get_attn_isa(layers[0].q.dtype, VLLM_BLOCK, HEAD_DIM)
        blocks = w.context // VLLM_BLOCK
        for x in layers:
            table = torch.randperm(w.batch * blocks).int().view(w.batch, blocks)
            both = torch.zeros(w.batch * blocks, w.kv_heads, 2 * VLLM_BLOCK, HEAD_DIM, dtype=x.q.dtype)
            k_cache, v_cache = both.chunk(2, dim=2)
            slots = (table.long()[..., None] * VLLM_BLOCK + torch.arange(VLLM_BLOCK)).view(-1)
            k, v = (y.transpose(1, 2).reshape(-1, w.kv_heads, HEAD_DIM) for y in x.contiguous)
            self.ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots, self.isa)
            self.caches.append((k_cache, v_cache, table))

    def calls(self, w: Workload) -> list[Call]:
        """After torch has the workload's threads. vLLM makes the plan once a step, so it is not timed."""
        starts = torch.arange(w.batch + 1, dtype=torch.int32)
        plan = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=w.batch,
            num_heads=w.heads,
            num_kv_heads=w.kv_heads,
            head_dim=HEAD_DIM,
            seq_lens=self.layers[0].after,
            dtype=self.layers[0].q.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )

        def call(x: Layer, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            out = torch.empty_like(x.q)
            self.ops.cpu_attention_with_kv_cache(
                x.q, k, v, out, starts, x.after, HEAD_DIM**-0.5, True, None, -1, table, 0.0, plan, None
            )
            return out

        return [lambda x=x, c=c: call(x, *c) for x, c in zip(self.layers, self.caches, strict=True)]


def vllm_caches(w: Workload, layers: list[Layer]) -> VllmCaches | None:
    try:
        return VllmCaches(w, layers)
    except ImportError:
        print(f"{w}: no row for vLLM's kernel, as its package is not installed")
        return None


def check(w: Workload, kinds: dict[str, list[Call]], layers: list[Layer]) -> None:
    """Every dense kernel gives about the same output."""
    expected = attend(layers[0], None).float()
    for name in (SDPA, FLEX, VLLM):
        for call in kinds.get(name, [])[:1]:
            off = ((call().float() - expected).norm() / expected.norm()).item()
            assert off < 2e-2, f"{w}: {name} and the dense mode differ by {off:.2g}"


def read_calls(nbytes: int, buffer: Tensor) -> list[Call]:
    """Sums of contiguous float32, by torch."""
    count = nbytes // 4
    starts = range(0, buffer.numel() - count + 1, max(count, 1 << 20))
    return [lambda i=i: buffer[i : i + count].sum() for i in starts]


def time_call(call: Call, threads: int, times: int) -> float:
    """Milliseconds of a call: of its thread's own time where it has one, so that other programs take none of it."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    if times > 1:
        call()
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) * 1e3 / times


def measure(w: Workload, layers: list[Layer], seconds: float, vllm: VllmCaches | None) -> dict[str, object]:
    torch.set_num_threads(w.threads)
    kinds: dict[str, list[Call]] = {
        STEP: [lambda x=x: step(w, x) for x in layers],
        "estimate": [lambda x=x: estimate(x) for x in layers],
        "topk_pages": [lambda x=x: select(w, x) for x in layers],
        "sparse_decode": [lambda x=x: attend(x, x.pages) for x in layers],
        DENSE: [lambda x=x: attend(x, None) for x in layers],
        SDPA: [lambda x=x: sdpa(w, x) for x in layers],
    }
    if vllm:
        kinds[VLLM] = vllm.calls(w)
    if w.context == 32768 and w.batch == 1 and w.kv_heads == 8:
        compiled = flex(w)
        kinds[FLEX] = [lambda x=x: compiled(x) for x in layers]
    most = max(w.bytes.values())
    buffer = torch.ones(max(most // 4, (most if w.cached else COLD_BYTES) // 4))
    kinds |= {f"read: {name}": read_calls(nbytes, buffer) for name, nbytes in w.bytes.items()}
    check(w, kinds, layers)
    for calls in kinds.values():
        calls[0]()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    started, rounds = time.perf_counter(), 0
    while rounds < 5 or (rounds < 60 and time.perf_counter() - started < seconds):
        for i, (name, calls) in enumerate(kinds.items()):  # another layer than the kind before, which read it
            call = calls[(rounds * len(kinds) + i) % len(calls)]
            times[name].append(time_call(call, w.threads, w.calls))
        rounds += 1
    summaries = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        summaries[name] = {"median": median, "low": low, "high": high}
    workload = {**asdict(w), "layers": len(layers), "name": str(w)}
    return {"workload": workload, "bytes": w.bytes, "rounds": rounds, "milliseconds": summaries}


def machine() -> dict[str, object]:
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "isa": build_info["cpu_isa"],
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def targets(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    """The issue's targets, of the workload at 32/8 heads and 32K tokens: what, target, measured, met."""
    found = {row["workload"]["name"]: row for row in rows}
    lines: list[tuple[str, str, str, bool]] = []

    def add(what: str, row: str, over: str, under: str, least: float, percent: bool = False) -> None:
        times = found.get(row, {}).get("milliseconds", {})
        if over in times and under in times:
            ratio = times[over]["median"] / times[under]["median"]
            shown = (f"{least:.0%}", f"{ratio:.0%}") if percent else (f"{least:g}x", f"{ratio:.1f}x")
            lines.append((what, *shown, ratio >= least))

    for dtype, over_sdpa, over_vllm in (("bfloat16", 140, 13), ("float32", 60, 10)):
        row = f"32/8 B 1, 32768, {dtype}, 1 thread"
        add(f"{dtype}: step over torch SDPA", row, SDPA, STEP, over_sdpa)
        add(f"{dtype}: step over vLLM", row, VLLM, STEP, over_vllm)
        add(f"{dtype}: estimate, of the read rate", row, "read: estimate", "estimate", 0.6, percent=True)
        for name in ("sparse_decode", DENSE):
            add(f"{dtype}: {name}, of the read rate", row, f"read: {name}", name, 0.7, percent=True)
        small = found.get(f"32/8 B 1, 256, {dtype}, 1 thread")
        if small:
            us = small["milliseconds"][STEP]["median"] * 1e3
            lines.append((f"{dtype}: step of 16 pages", "30 us", f"{us:.0f} us", us < 30))
        two = found.get(row.replace("1 thread", "2 threads"))
        if two and row in found:
            gain = found[row]["milliseconds"][STEP]["median"] / two["milliseconds"][STEP]["median"]
            lines.append((f"{dtype}: 2 threads over 1", "1.8x", f"{gain:.2f}x", gain >= 1.8))
    return lines


def draw(result: dict, path: Path) -> None:
    """Time by context at 32/8 heads, batch 1 and one thread, a panel a dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    colours = {SDPA: "#999999", VLLM: "#E69F00", DENSE: "#56B4E9", STEP: "#0072B2", f"read: {STEP}": "#009E73"}
    for axes, dtype in zip(panels, ("bfloat16", "float32"), strict=True):
        for name, colour in colours.items():
            points = [
                (row["workload"]["context"], row["milliseconds"][name]["median"])
                for row in result["rows"]
                if row["workload"]["name"].startswith("32/8 B 1,")
                and row["workload"]["dtype"] == dtype
                and row["workload"]["threads"] == 1
                and name in row["milliseconds"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        axes.set(xscale="log", yscale="log", title=f"{dtype}, 32/8 heads, budget {BUDGET}", xlabel="tokens of context")
        axes.set_xticks([256, 2048, 8192, 32768, 131072], ["256", "2K", "8K", "32K", "128K"])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms a layer and step, one thread")
    panels[1].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only workloads with one of the texts in their name")
    parser.add_argument("--seconds", type=float, default=3, help="of rounds a workload, 5 rounds at least")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu.json"))
    options = parser.parse_args()

    workloads = [w for w in all_workloads() if not options.only or any(text in str(w) for text in options.only)]
    result: dict = {"machine": machine(), "rows": []}
    layers: list[Layer] = []
    vllm: VllmCaches | None = None
    made: object = None
    for w in workloads:
        if w.dense_bytes > MOST_BYTES:
            print(f"{w}: skipped, {w.dense_bytes / 2**30:.1f} GiB a layer")
            continue
        key = (w.heads, w.kv_heads, w.batch, w.context, w.dtype)
        if key != made:  # workloads that differ in threads only share their layers
            layers, vllm, made = [], None, key
            torch.set_num_threads(2)
            layers = [make_layer(w, i) for i in range(w.layers)]
            vllm = vllm_caches(w, layers)
        row = measure(w, layers, options.seconds, vllm)
        result["rows"].append(row)
        print(str(w), {name: round(t["median"], 3) for name, t in row["milliseconds"].items()}, flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for line in targets(result["rows"]):
        print(*line[:3], "met" if line[3] else "missed", sep=" | ")
    draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
