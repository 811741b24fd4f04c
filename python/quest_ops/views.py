"""Contiguous KV caches seen as pages: for engines that keep their own cache. Nothing is copied.

A page is S successive tokens of a sequence, so a contiguous cache already is a paged one with a regular page table. Use
the view's tensors with the operators: ``append_kv`` or, where the engine writes its cache itself, ``update_bounds``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import PAGE_SIZES
from .page_bounds import BoundsKind


class PageView(NamedTuple):
    """A cache as the operators take it: k_cache and v_cache [N, Hkv, S, D] views, page_table [B, P] int32."""

    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor


def page_view_bhld(k: Tensor, v: Tensor, page_size: int = 16) -> PageView:
    """View a cache laid out [B, Hkv, L, D] as pages.

    Page p of sequence b is at ``page_table[b, p]``: a multiple of the largest step that reaches every page, so any
    strides will do. Where a head's pages lie between those of the others, as in a contiguous [B, Hkv, L, D], physical
    pages overlap in memory, though not those that the table names: operators are exact, but PyTorch refuses to clone or
    fill such a view as a whole. Take the bounds from :func:`empty_bounds`, which are laid out likewise.

    Args:
        k, v: [B, Hkv, L, D] with the same strides and stride(-1) = 1; L a multiple of page_size.
        page_size: S.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not allow it.
    """
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {page_size}")
    if k.dim() != 4:
        raise ValueError(f"k must have 4 dimensions, got {list(k.shape)}")
    if (v.shape, v.stride(), v.dtype, v.device) != (k.shape, k.stride(), k.dtype, k.device):
        raise ValueError(
            f"v must have shape {list(k.shape)}, strides {k.stride()}, {k.dtype} on {k.device} like k, "
            f"got {list(v.shape)}, {v.stride()}, {v.dtype} on {v.device}"
        )
    B, Hkv, L, D = k.shape
    if min(k.shape) == 0 or L % page_size:
        raise ValueError(f"k must hold a positive multiple of {page_size} tokens (L), got {L} in {list(k.shape)}")
    if k.stride(3) != 1:
        raise ValueError(f"k must have stride 1 in its last dimension, got {k.stride(3)}")
    sequence, head, token, _ = k.stride()
    P = L // page_size
    sequence = sequence if B > 1 else 0
    step = math.gcd(sequence, page_size * token)
    sequence_pages, page_pages = sequence // step, page_size * token // step
    N = (B - 1) * sequence_pages + (P - 1) * page_pages + 1
    size, stride = (N, Hkv, page_size, D), (step, head, token, 1)
    sequences = torch.arange(B, dtype=torch.int32, device=k.device)
    pages = torch.arange(P, dtype=torch.int32, device=k.device)
    page_table = sequences[:, None] * sequence_pages + pages * page_pages
    return PageView(k.as_strided(size, stride), v.as_strided(size, stride), page_table)


def page_view_blhd(k: Tensor, v: Tensor, page_size: int = 16) -> PageView:
    """View a cache laid out [B, L, Hkv, D] as pages: :func:`page_view_bhld` of its transpose."""
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"k and v must have shape [B, L, Hkv, D], got {list(k.shape)} and {list(v.shape)}")
    return page_view_bhld(k.transpose(1, 2), v.transpose(1, 2), page_size)


def empty_bounds(view: PageView, bounds: BoundsKind = "cache") -> Tensor:
    """Uninitialised bounds [N, Hkv, 2, D] for a view, in as little memory as the layout lets them have.

    Where heads lie whole pages apart, a head's bounds are as many pages apart: a contiguous [B, Hkv, L, D] has its
    bounds as [B, Hkv, P, 2, D]. A cache whose sequences do not lie whole pages apart takes up to S times that.

    Args:
        view: of the cache.
        bounds: "cache" for its dtype, or "int8", which goes with :func:`empty_scales`.
    """
    k = view.k_cache
    return _empty_by_page(k, (2, k.shape[3]), torch.int8 if bounds == "int8" else k.dtype)


def empty_scales(view: PageView) -> Tensor:
    """Uninitialised scales [N, Hkv] float32 of int8 bounds, laid out as these are."""
    return _empty_by_page(view.k_cache, (), torch.float32)


def _empty_by_page(k: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[N, Hkv, *shape] for pages k [N, Hkv, S, D]."""
    N, Hkv, *_ = k.shape
    pages_apart, rest = divmod(k.stride(1), k.stride(0))
    if rest or pages_apart == 0:
        return k.new_empty((N, Hkv, *shape), dtype=dtype)
    storage = k.new_empty((N + (Hkv - 1) * pages_apart, *shape), dtype=dtype)
    page, *inside = storage.stride()
    return storage.as_strided((N, Hkv, *shape), (page, pages_apart * page, *inside))
