"""How the bounds of a page's keys are kept: in the cache's dtype, or in 8 bits with a scale for each page and head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: "cache": in the cache's dtype. "int8": in bytes with a float32 scale, half of 16-bit bounds; rounded outward, so that
#: they stay bounds, a little looser.
BoundsKind = Literal["cache", "int8"]


def new_bounds(
    pool: tuple[int, ...], head_dim: int, kind: BoundsKind, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Zeroed k_bounds [*pool, 2, D] for a cache of this dtype, and k_scales [*pool] float32, None where it has none."""
    if kind == "cache":
        return torch.zeros((*pool, 2, head_dim), dtype=dtype, device=device), None
    k_bounds = torch.zeros((*pool, 2, head_dim), dtype=torch.int8, device=device)
    return k_bounds, torch.zeros(pool, dtype=torch.float32, device=device)


def bytes_of_bounds(head_dim: int, kind: BoundsKind, dtype: torch.dtype) -> int:
    """What one page's bounds take for one head, its scale included."""
    return 2 * head_dim * dtype.itemsize if kind == "cache" else 2 * head_dim + torch.float32.itemsize
