"""Contiguous KV caches as pages, without a copy: for engines that keep their own cache.

A page is S successive tokens of a sequence, so a contiguous cache is a paged one with a regular page table. The view's
tensors go to the operators: to ``append_kv``, or to ``update_bounds`` where the engine writes its cache itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import BoundsKind, bounds_dtype, bounds_width
from .ops import PAGE_SIZES, check_choice


class PageView(NamedTuple):
    """The operators' arguments for a cache: k_cache and v_cache [N, Hkv, S, D] views, page_table [B, P] int32."""

    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor


def page_view_bhld(k: Tensor, v: Tensor, page_size: int = 16) -> PageView:
    """View a cache laid out [B, Hkv, L, D] as pages.

    Page p of sequence b is at ``page_table[b, p]``, counted in the largest step that reaches every page. So any strides
    work. In a contiguous [B, Hkv, L, D] a head's pages lie between those of other heads. Physical pages then overlap in
    memory, but the pages that the table names do not. The operators are exact on such a view, while PyTorch refuses to
    clone or fill it as a whole. :func:`empty_bounds` gives bounds of the same layout.

    Args:
        k, v: [B, Hkv, L, D] with the same strides and stride(-1) = 1; L a multiple of page_size.
        page_size: S.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not allow it.
    """
    check_choice("page_size", page_size, PAGE_SIZES)
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
    """Uninitialised k_bounds for a view, in the least memory that its layout allows.

    Where heads lie whole pages apart, their bounds lie the same number of pages apart: a contiguous [B, Hkv, L, D] has
    its bounds as [B, Hkv, P, 2, D]. A cache whose sequences do not lie whole pages apart takes up to S times that.

    Args:
        view: of the cache.
        bounds: "cache" for its dtype; or "int8" or "int4", which need :func:`empty_scales` too.
    """
    k = view.k_cache
    return _empty_by_page(k, (2, bounds_width(bounds, k.shape[3])), bounds_dtype(bounds, k.dtype))


def empty_scales(view: PageView) -> Tensor:
    """Uninitialised scales [N, Hkv] float32 for bounds of 8 or 4 bits, in the layout of :func:`empty_bounds`."""
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
