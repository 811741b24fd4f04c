"""Names of quest_ops beyond its public ones, imported in this one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quest_ops._library import cuda_missing
from quest_ops.bounds import BoundsKind, bytes_of_bounds
from quest_ops.codes import bytes_of_codes, new_codes
from quest_ops.ops import HEAD_DIMS, PAGE_SIZES, GroupReduce

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "HEAD_DIMS",
    "PAGE_SIZES",
    "BoundsKind",
    "GroupReduce",
    "bytes_of_bounds",
    "bytes_of_codes",
    "cuda_missing",
    "dense_prefill",
    "new_codes",
]


def dense_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    past: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal dense attention of new tokens to earlier ones and to themselves.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, T, D], of the new tokens.
        scale: of the scores before the softmax.
        window: tokens that a token sees, itself included; None: all.
        past: the earlier tokens' keys and values [B, Hkv, L, D], and their number int32 [B]; None: there are none.

    Returns:
        [B, T, Hq, D].
    """
    import torch
    from quest_ops.dense import Features, Past, prefill

    earlier = None
    if past is not None:
        keys, values, lengths = past
        earlier = Past(keys, values, torch.arange(keys.shape[2], device=q.device)[None], lengths)
    return prefill(q, k, v, None, Features(scale, window), earlier)
