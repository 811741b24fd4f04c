"""Fake (meta) kernels: the shapes and dtypes of each operator's results, for tracing without data."""

from __future__ import annotations

from typing import Any

import torch

from ._library import NAMESPACE


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"{NAMESPACE}::{name}")


@_fake("append_kv")
def _append_kv(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens=None, k_scales=None):  # type: ignore[no-untyped-def]
    return None


@_fake("update_bounds")
def _update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token=None, k_scales=None):  # type: ignore[no-untyped-def]
    return None


@_fake("estimate")
def _estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales=None, new_lens=None):  # type: ignore[no-untyped-def]
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
):
    heads = scores.shape[-2] if group_reduce == 0 else num_kv_heads
    return scores.new_empty((*scores.shape[:-2], heads, k), dtype=torch.int32)


@_fake("sparse_decode")
def _sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages=None, scale=None, new_lens=None):  # type: ignore[no-untyped-def]
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
):
    heads = q.shape[-2] if group_reduce == 0 else k_cache.shape[1]
    pages = q.new_empty((*q.shape[:-2], heads, num_pages), dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32), pages
