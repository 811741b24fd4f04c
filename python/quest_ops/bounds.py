"""Kinds of page bounds: their dtypes, their bytes and their allocation.

:func:`quest_ops.estimate` scores a page by ``q+ . upper + q- . lower``. The operators write two kinds of bounds: the
elementwise minimum and maximum of a page's keys (Tang et al., ICML 2024), or their mean minus and plus some standard
deviations (UNIQUE, 2026). Each can be stored in three ways.
"""

from __future__ import annotations

from numbers import Real
from typing import Literal

import torch
from torch import Tensor

#: How bounds are stored. "cache": in the cache's dtype. "int8" and "int4": whole numbers of 8 or 4 bits with a float32
#: scale a page and head, a half and a quarter of the size of 16-bit bounds. Minimum and maximum are rounded outward, so
#: they stay bounds but are a little looser.
BoundsKind = Literal["cache", "int8", "int4"]
_DTYPES = {"int8": torch.int8, "int4": torch.uint8}


def bounds_dtype(kind: BoundsKind, dtype: torch.dtype) -> torch.dtype:
    """The dtype of k_bounds for a cache of ``dtype``."""
    return _DTYPES.get(kind, dtype)


def bounds_width(kind: BoundsKind, head_dim: int) -> int:
    """The last dimension of k_bounds: D, or D / 2 where a byte holds two numbers."""
    return head_dim // 2 if kind == "int4" else head_dim


def kind_of(k_bounds: Tensor) -> BoundsKind:
    """The kind of some k_bounds."""
    return {torch.int8: "int8", torch.uint8: "int4"}.get(k_bounds.dtype, "cache")  # type: ignore[return-value]


def bytes_of_bounds(head_dim: int, kind: BoundsKind, dtype: torch.dtype) -> int:
    """Bytes of one page's bounds for one head, its scale included."""
    scale = 0 if kind == "cache" else torch.float32.itemsize
    return 2 * bounds_width(kind, head_dim) * bounds_dtype(kind, dtype).itemsize + scale


def check_std_factor(value: object) -> None:
    """Raises ValueError unless ``value`` is a finite number of at least 0, or None."""
    if value is not None and not (isinstance(value, Real) and 0 <= float(value) <= torch.finfo(torch.float32).max):
        raise ValueError(f"std_factor must be a finite number of at least 0, or None, got {value!r}")


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
        k_bounds [*pool, 2, D], or [*pool, 2, D / 2] for "int4"; and k_scales [*pool] float32, or None for "cache".
    """
    shape = (*pool, 2, bounds_width(kind, head_dim))
    k_bounds = torch.zeros(shape, dtype=bounds_dtype(kind, dtype), device=device)
    return k_bounds, None if kind == "cache" else torch.zeros(pool, dtype=torch.float32, device=device)
