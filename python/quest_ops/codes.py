"""Codes of keys, in 2 bits a dimension: their allocation and their bytes. See :func:`quest_ops.ops.append_codes`."""

from __future__ import annotations

import torch
from torch import Tensor


def new_codes(pool: tuple[int, ...], head_dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Zeroed k_codes [*pool, D / 4] uint8 and code_scales [*pool] float32.

    Args:
        pool: leading dimensions, such as (N, Hkv, S) or (L, N, Hkv, S).
        head_dim: D.
        device: of the cache.
    """
    k_codes = torch.zeros((*pool, head_dim // 4), dtype=torch.uint8, device=device)
    return k_codes, torch.zeros(pool, dtype=torch.float32, device=device)


def bytes_of_codes(head_dim: int) -> int:
    """Bytes of the code of one token for one head, its scale included."""
    return head_dim // 4 + torch.float32.itemsize
