"""The inputs of a decode step on the GPU, and the step by this library's operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from quest_ops import append_kv, decode_step, estimate, ops, reference, sparse_decode, topk_pages, update_bounds
from quest_ops.bounds import new_bounds
from torch import Tensor
from workloads import Workload, layers_that_fit

DEVICE = "cuda"


@dataclass
class Layer:
    """The inputs of one call."""

    q: Tensor
    k_new: Tensor
    v_new: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor
    k_scales: Tensor | None  # with bounds of 8 or 4 bits
    page_table: Tensor
    before: Tensor  # [B] tokens before the step
    after: Tensor  # [B] tokens with the new one
    std_factor: float | None
    counters: Tensor | None  # None with builds that lack them


def new_layer(w: Workload) -> Layer:
    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=w.dtype)

    N = w.batch * w.pages
    k_cache, v_cache = (randn(N, w.kv_heads, w.page_size, w.head_dim) for _ in range(2))
    page_table = torch.randperm(N, device=DEVICE).int().view(w.batch, w.pages)
    q = randn(w.batch, w.heads, w.head_dim)
    if w.selection == "clustered":  # the best pages are neighbours
        towards = q.view(w.batch, w.kv_heads, -1, w.head_dim).mean(2)
        position = torch.arange(w.pages, device=DEVICE) / w.pages
        height = (-(((position - 0.4) / 0.05) ** 2)).exp().to(w.dtype)
        for b in range(w.batch):
            k_cache[page_table[b].long()] += height[:, None, None, None] * towards[b][None, :, None]
    k_bounds, k_scales = new_bounds((N, w.kv_heads), w.head_dim, w.bounds, w.dtype, DEVICE)
    after = torch.full((w.batch,), w.context - 3, dtype=torch.int32, device=DEVICE)
    kind = {} if w.std_factor is None else {"std_factor": w.std_factor}
    update_bounds(k_cache, k_bounds, page_table, after, k_scales=k_scales, **kind)
    new = (randn(w.batch, 1, w.kv_heads, w.head_dim) for _ in range(2))
    tensors = (q, *new, k_cache, v_cache, k_bounds, k_scales, page_table, after - 1, after)
    counters = ops.new_counters(w.batch, w.kv_heads, DEVICE) if hasattr(ops, "new_counters") else None
    return Layer(*tensors, w.std_factor, counters)


def cold_layers(w: Workload) -> list[Layer]:
    """Distinct layers whose bytes exceed five times the L2 cache, as far as memory holds them and their copies."""
    cold = 5 * torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(64, math.ceil(cold / w.sparse_bytes), layers_that_fit(w)))
    return [new_layer(w) for _ in range(count)]


def append(x: Layer) -> None:
    caches = (x.k_cache, x.v_cache, x.k_bounds)
    append_kv(x.k_new, x.v_new, *caches, x.page_table, x.before, k_scales=x.k_scales, **std_factor(x))


def std_factor(x: Layer) -> dict[str, float]:
    """The argument where it is not the default, since older builds lack it."""
    return {} if x.std_factor is None else {"std_factor": x.std_factor}


def counters(x: Layer) -> dict[str, Tensor]:
    return {} if x.counters is None else {"counters": x.counters}


def score(w: Workload, x: Layer) -> Tensor:
    return estimate(x.q, x.k_bounds, x.page_table, x.after, w.page_size, x.k_scales)


def select(w: Workload, x: Layer) -> Tensor:
    return topk_pages(score(w, x), x.after, w.page_size, w.selected, w.kv_heads)


def attend(x: Layer, pages: Tensor | None) -> Tensor:
    return sparse_decode(x.q, x.k_cache, x.v_cache, x.page_table, x.after, pages)[0]


def four_operators(w: Workload, x: Layer) -> Tensor:
    append(x)
    return attend(x, select(w, x))


def dense_step(w: Workload, x: Layer) -> Tensor:
    """A dense layer's step by decode_step."""
    return one_call(w, x, num_pages=0)


def one_call(w: Workload, x: Layer, **lists: Any) -> Tensor:
    """The step by decode_step; lists: its arguments for kept pages, or for every page."""
    caches = (x.k_cache, x.v_cache, x.k_bounds)
    lengths = (x.page_table, x.before, x.after)
    options = {"num_pages": w.selected, "k_scales": x.k_scales, **std_factor(x), **counters(x), **lists}
    return decode_step(x.q, x.k_new, x.v_new, *caches, *lengths, **options)[0]


def kept_step(w: Workload, x: Layer, kept: Tensor, steps: Tensor) -> Tensor:
    """decode_step with the lists of an earlier step, kept [B, Hkv, K]; steps [B] are odd."""
    return one_call(w, x, kept_pages=kept, kept_steps=steps, reselect_every=2)


def check(w: Workload, x: Layer) -> None:
    """Hold decode_step to the four operators bit for bit, and one sequence and KV head of both to float64."""
    out, pages = one_call(w, x), select(w, x)
    assert torch.equal(out, four_operators(w, x)), f"{w}: decode_step differs from the four operators"
    odd = torch.ones_like(x.after)
    assert torch.equal(kept_step(w, x, pages.clone(), odd), out), f"{w}: kept pages are not those of the selection"
    group, dense = w.heads // w.kv_heads, attend(x, None)
    assert torch.equal(dense_step(w, x), dense), f"{w}: the step over every page is not sparse_decode's"
    b, h = w.batch - 1, w.kv_heads - 1
    heads = slice(h * group, (h + 1) * group)
    one = [x.q[b : b + 1, heads], x.k_cache[:, h : h + 1], x.v_cache[:, h : h + 1], x.page_table[b : b + 1]]
    exact = reference.sparse_decode(*one, x.after[b : b + 1], pages[b : b + 1, h : h + 1])[0]
    close = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[w.dtype]
    error = ((out[b, heads].double() - exact[0]).norm() / exact.norm()).item()
    assert error < close, f"{w}: decode_step is off by {error:.2g}"
    scales = None if x.k_scales is None else x.k_scales[:, h : h + 1]
    scores = reference.estimate(one[0], x.k_bounds[:, h : h + 1], one[3], x.after[b : b + 1], w.page_size, scales)
    best = scores[0].amax(0)[pages[b, h].long()].sort().values[1:]  # the last page is forced
    rest = scores[0].amax(0).scatter(0, pages[b, h].long(), -math.inf).max()
    assert best[0] >= rest - 1e-3 * rest.abs(), f"{w}: a page was passed over"
    if w.selected == w.pages:
        assert torch.equal(out, dense), f"{w}: all pages are not the dense result"
