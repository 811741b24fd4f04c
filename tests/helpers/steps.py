"""Cases of decode_step: tensors before a step, the step in one call, and as the operators in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from quest_ops import ops
from torch import Tensor

from .operator_cases import LAYOUTS, UNREAD_BYTE, Case, Shape, assert_same_bits, place

Results = tuple[Tensor, Tensor, Tensor]


def limits_around(lengths: Sequence[int]) -> st.SearchStrategy[int]:
    """Values of dense_below that lengths lie on both sides of."""
    edges = {max(0, n + off) for n in lengths for off in (-1, 0, 1)}
    return st.sampled_from(sorted(edges | {max(edges) + 100}))


def before_step(shape: Shape, new_lens: tuple[int, ...] | None = None) -> Case:
    """The case without its last tokens in the cache; the shape's lengths are those after the step.

    new_lens: each sequence's new tokens, the first of the T of k, v and q. What follows them is NaN. None: T for each.
    """
    T = max(1, shape.new_tokens)
    case = Case(shape)
    size = (len(shape.lengths), T, shape.kv_heads, shape.head_dim)
    k, v = (torch.full(size, math.nan, dtype=shape.dtype) for _ in range(2))
    news = new_lens or (T,) * len(shape.lengths)
    for b, (length, n) in enumerate(zip(shape.lengths, news, strict=True)):
        for new, tokens in ((k, case.keys), (v, case.values)):
            new[b, :n] = tokens[b][length - n :]
        page, slot = case.slots(b, range(length - n, length))
        case.k_cache[page, :, slot] = case.v_cache[page, :, slot] = math.nan
        case.k_bounds[page] = UNREAD_BYTE
        if case.k_scales is not None:
            case.k_scales[page] = math.nan
    lens = torch.tensor(news, dtype=torch.int32)
    return case.having(k=k, v=v, start_lens=case.seq_lens - lens, new_lens=None if new_lens is None else lens)


def on(case: Case, device: str) -> Case:
    layouts = case.shape.layouts
    return case.on(device).having(
        k=place(case.k, LAYOUTS[layouts[1]], device),
        v=place(case.v, LAYOUTS[layouts[2]], device),
        start_lens=place(case.start_lens, "unaligned", device),
        new_lens=None if case.new_lens is None else place(case.new_lens, "unaligned", device),
    )


def caches(x: Case) -> list[Tensor]:
    return [t for t in (x.k_cache, x.v_cache, x.k_bounds, x.k_scales) if t is not None]


def one_step(x: Case, num_pages: int, **options: Any) -> Results:
    return ops.decode_step(
        x.q,
        x.k,
        x.v,
        x.k_cache,
        x.v_cache,
        x.k_bounds,
        x.page_table,
        x.start_lens,
        x.seq_lens,
        num_pages,
        **options,
        k_scales=x.k_scales,
        new_lens=x.new_lens,
        std_factor=x.shape.kind.std_factor,
    )


def four_steps(
    x: Case,
    num_pages: int,
    group_reduce: Any = "max",
    sink_pages: int = 0,
    recent_pages: int = 1,
    scale: float | None = None,
    budgets: Tensor | None = None,
    dense_below: int = 0,
) -> Results:
    """append_kv, estimate, topk_pages and sparse_decode; append_kv and dense sparse_decode for a num_pages of 0."""
    S, D, Hkv = x.k_cache.shape[2], x.shape.head_dim, x.shape.kv_heads
    if scale is None:
        scale = (1 / torch.tensor(float(D)).sqrt()).item()  # in float32, as in the operators
    caches = (x.k_cache, x.v_cache, x.k_bounds, x.page_table)
    ops.append_kv(x.k, x.v, *caches, x.start_lens, x.new_lens, x.k_scales, x.shape.kind.std_factor)
    if num_pages == 0:
        no_lists = x.seq_lens.new_empty(*x.q.shape[:-2], x.shape.heads if group_reduce == "none" else Hkv, 0)
        return *ops.sparse_decode(*x.attention, None, scale, x.new_lens), no_lists
    scores = ops.estimate(*x.scoring, S, x.k_scales, x.new_lens)
    how = (group_reduce, sink_pages, recent_pages, scale, x.new_lens, budgets, dense_below)
    pages = ops.topk_pages(scores, x.seq_lens, S, num_pages, Hkv, *how)
    return *ops.sparse_decode(*x.attention, pages, scale, x.new_lens), pages


def assert_same_step(case: Case, device: str, num_pages: int, **options: Any) -> Case:
    """Returns the case after the step."""
    four = on(case, device)
    expected = four_steps(four, num_pages, **options)
    counters = ops.new_counters(len(case.shape.lengths), case.shape.kv_heads, device)
    # An even step, an odd one, and one that clears counters of its own.
    for given in [counters, counters, None] if device == "cuda" else [counters]:
        one = on(case, device)
        for actual, value in zip(one_step(one, num_pages, counters=given, **options), expected, strict=True):
            assert actual.is_contiguous()
            assert_same_bits(actual, value)
        for actual, value in zip(caches(one), caches(four), strict=True):
            assert_same_bits(actual._base, value._base)
    return one
