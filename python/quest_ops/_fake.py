"""Fake (meta) kernels: each operator's checks, and the shapes and dtypes of its results, for tracing without data.

PyTorch runs them for meta tensors too, even where the other arguments are real: so they check devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

from . import _check_arguments as check
from ._library import NAMESPACE


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"{NAMESPACE}::{name}")


def _written(**tensors: Tensor | None) -> None:
    """What all fake kernels of writing operators do with the tensors they write."""
    check.check_written(tensors)
    for x in tensors.values():
        if x is not None:
            _fix_computed_offset(x)


def _fix_computed_offset(x: Tensor) -> None:
    """Makes the sizes of a written tensor static where its storage offset is computed from symbolic sizes.

    Inductor (torch 2.13) takes such an offset for 0 where an operator writes: one layer of a pool, or the values of
    a joint tensor, would be written in the wrong place.
    """
    offset = x.storage_offset()
    if isinstance(offset, SymInt) and not offset.node.expr.is_symbol:
        for size in (*x.shape, *x.stride(), offset):
            int(size)


@_fake("append_kv")
def _append_kv(  # type: ignore[no-untyped-def]
    k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens=None, k_scales=None, std_factor=None
):
    check.check_append_kv(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales, std_factor)
    _written(k_cache=k_cache, v_cache=v_cache, k_bounds=k_bounds, k_scales=k_scales)


@_fake("update_bounds")
def _update_bounds(  # type: ignore[no-untyped-def]
    k_cache, k_bounds, page_table, seq_lens, first_token=None, k_scales=None, std_factor=None
):
    check.check_update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token, k_scales, std_factor)
    _written(k_bounds=k_bounds, k_scales=k_scales)


@_fake("estimate")
def _estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales=None, new_lens=None):  # type: ignore[no-untyped-def]
    check.check_estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales, new_lens)
    return q.new_empty((*q.shape[:-1], page_table.shape[1]), dtype=torch.float32)


@_fake("topk_pages")
def _topk_pages(  # type: ignore[no-untyped-def]
    scores,
    seq_lens,
    page_size,
    k,
    num_kv_heads,
    group_reduce=1,
    sink_pages=0,
    recent_pages=1,
    scale=1.0,
    new_lens=None,
    budgets=None,
    dense_below=0,
):
    check.check_topk_pages(
        scores,
        seq_lens,
        page_size,
        k,
        num_kv_heads,
        group_reduce,
        sink_pages,
        recent_pages,
        scale,
        new_lens,
        budgets,
        dense_below,
    )
    heads = scores.shape[-2] if group_reduce == 0 else num_kv_heads
    places = max(k, check.pages_of(dense_below, page_size))
    return scores.new_empty((*scores.shape[:-2], heads, places), dtype=torch.int32)


@_fake("append_codes")
def _append_codes(k, k_codes, code_scales, page_table, seq_lens, new_lens=None):  # type: ignore[no-untyped-def]
    check.check_append_codes(k, k_codes, code_scales, page_table, seq_lens, new_lens)
    _written(k_codes=k_codes, code_scales=code_scales)


@_fake("rerank_pages")
def _rerank_pages(  # type: ignore[no-untyped-def]
    q, k_codes, code_scales, page_table, seq_lens, pages, token_reduce=0, scale=1.0, new_lens=None
):
    check.check_rerank_pages(q, k_codes, code_scales, page_table, seq_lens, pages, token_reduce, scale, new_lens)
    return q.new_empty((*q.shape[:-1], page_table.shape[1]), dtype=torch.float32)


@_fake("sparse_decode")
def _sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages=None, scale=None, new_lens=None):  # type: ignore[no-untyped-def]
    check.check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale, new_lens)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("decode_step")
def _decode_step(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    k_cache,
    v_cache,
    k_bounds,
    page_table,
    start_lens,
    seq_lens,
    num_pages,
    group_reduce=1,
    sink_pages=0,
    recent_pages=1,
    scale=None,
    k_scales=None,
    new_lens=None,
    budgets=None,
    std_factor=None,
    counters=None,
    kept_pages=None,
    kept_steps=None,
    reselect_every=1,
    dense_below=0,
):
    check.check_decode_step(
        q,
        k,
        v,
        k_cache,
        v_cache,
        k_bounds,
        page_table,
        start_lens,
        seq_lens,
        num_pages,
        group_reduce,
        sink_pages,
        recent_pages,
        scale,
        k_scales,
        new_lens,
        budgets,
        std_factor,
        counters,
        kept_pages,
        kept_steps,
        reselect_every,
        dense_below,
    )
    _written(k_cache=k_cache, v_cache=v_cache, k_bounds=k_bounds, k_scales=k_scales)
    _written(counters=counters, kept_pages=kept_pages)
    heads = q.shape[-2] if group_reduce == 0 else k_cache.shape[1]
    has_lists = num_pages != 0 and kept_pages is None
    places = max(num_pages, check.pages_of(dense_below, k_cache.shape[2])) if has_lists else 0
    pages = q.new_empty((*q.shape[:-2], heads, places), dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32), pages
