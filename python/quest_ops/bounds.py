"""Kinds of page summary: their dtypes, their bytes and their allocation, and one kind that Python computes.

:func:`quest_ops.estimate` scores a page by ``q+ . upper + q- . lower``, whatever k_bounds holds. The operators write
Quest's own summary (Tang et al., ICML 2024), the elementwise minimum and maximum of a page's keys.
:func:`update_mean_std_bounds` writes another into the same tensor.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: How minimum and maximum are stored. "cache": in the cache's dtype. "int8": in bytes with a float32 scale a page and
#: head, half the size of 16-bit bounds. The bytes are rounded outward, so they stay bounds but are a little looser.
BoundsKind = Literal["cache", "int8"]


def bounds_dtype(kind: BoundsKind, dtype: torch.dtype) -> torch.dtype:
    """The dtype of k_bounds for a cache of ``dtype``."""
    return dtype if kind == "cache" else torch.int8


def bytes_of_bounds(head_dim: int, kind: BoundsKind, dtype: torch.dtype) -> int:
    """Bytes of one page's bounds for one head, its scale included."""
    scale = 0 if kind == "cache" else torch.float32.itemsize
    return 2 * head_dim * bounds_dtype(kind, dtype).itemsize + scale


def new_bounds(
    pool: tuple[int, ...], head_dim: int, kind: BoundsKind, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Zeroed bounds for a cache.

    Args:
        pool: leading dimensions, such as (N, Hkv) or (L, N, Hkv).
        head_dim: D.
        kind: of the bounds.
        dtype: the cache's.
        device: the cache's.

    Returns:
        k_bounds [*pool, 2, D], and k_scales [*pool] float32, or None where the kind has no scales.
    """
    k_bounds = torch.zeros((*pool, 2, head_dim), dtype=bounds_dtype(kind, dtype), device=device)
    return k_bounds, None if kind == "cache" else torch.zeros(pool, dtype=torch.float32, device=device)


def update_mean_std_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    num_new: int | None = None,
    *,
    c: float = 1.0,
) -> None:
    """Write ``mean - c * std`` and ``mean + c * std`` of each page's keys in place of their minimum and maximum.

    The score becomes ``q . mean + c * sum_d |q_d| std_d``. It is no upper bound of q.k, but a single extreme key moves
    it less than it moves the minimum and maximum. The standard deviation divides by the number of keys in the page.
    Everything is computed in float32 and rounded once. Lengths are read on the device, so nothing synchronises.

    Args:
        k_cache: [N, Hkv, S, D], float16, bfloat16 or float32.
        k_bounds: [N, Hkv, 2, D], written: [..., 0, :] the lower, [..., 1, :] the upper.
        page_table: [B, P] int32, logical to physical page.
        seq_lens: [B] int32, tokens in the cache, at least 1 each.
        num_new: update only the pages of each sequence's last ``num_new`` tokens; None: all pages.
        c: standard deviations to either side, at least 0.

    Raises:
        ValueError: ``num_new`` or ``c`` out of its range, or k_bounds of another shape.
    """
    N, Hkv, S, D = k_cache.shape
    if list(k_bounds.shape) != [N, Hkv, 2, D]:
        raise ValueError(f"k_bounds must have shape {[N, Hkv, 2, D]} to go with k_cache, got {list(k_bounds.shape)}")
    if num_new is not None and num_new < 1:
        raise ValueError(f"num_new must be at least 1 or None, got {num_new}")
    if c < 0:
        raise ValueError(f"c must be at least 0, got {c}")
    P = page_table.shape[1]
    last = (seq_lens[:, None] - 1) // S
    # The host reads no length, so every possible page is computed; pages past the last one repeat it.
    if num_new is None:
        logical = torch.arange(P, device=page_table.device).minimum(last)
    else:
        count = min(P, (num_new + S - 2) // S + 1)
        logical = (last - torch.arange(count, device=page_table.device)).clamp(min=0)
    physical = page_table.gather(1, logical.long()).long()  # [B, pages]
    keys = k_cache[physical].float()  # [B, pages, Hkv, S, D]
    position = logical[..., None] * S + torch.arange(S, device=page_table.device)
    real = (position < seq_lens[:, None, None])[:, :, None, :, None]
    tokens = real.sum(3)  # [B, pages, 1, 1]
    keys = keys.where(real, 0)
    mean = keys.sum(3) / tokens
    deviation = (keys - mean[:, :, :, None]).where(real, 0)
    spread = c * (deviation.square().sum(3) / tokens).sqrt()
    k_bounds[physical] = torch.stack([mean - spread, mean + spread], 3).to(k_bounds.dtype)
