"""The attention that each token receives from several queries, by which H2O, TOVA and SnapKV choose."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores made at a time: 256 MiB in float32, and a few times that with their intermediates.
_ELEMENTS = 2**26


def add_column_sums(sums: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """Add to ``sums`` the causal attention that each token receives from the queries, summed over a group's heads.

    Works on a block of queries at a time, so that no tensor has the size of the context squared.

    Args:
        sums: float32 [B, Hkv, L or more].
        q: [B, Hq, T, D], the last T of the tokens of k.
        k: [B, Hkv, L, D].
        scale: of the scores before the softmax.
    """
    B, Hq, T, _ = q.shape
    Hkv, L = k.shape[1:3]
    block = max(1, min(T, _ELEMENTS // (B * Hq * L)))
    q, k = q.float(), k.float()
    place = torch.arange(L, device=q.device)
    for first in range(0, T, block):
        last = min(first + block, T)
        end = L - T + last  # tokens that the block's last query sees
        queries = q[:, :, first:last].unflatten(1, (Hkv, -1)).flatten(2, 3)  # [B, Hkv, G * block, D]
        scores = (queries @ k[:, :, :end].transpose(-1, -2)).unflatten(2, (Hq // Hkv, -1))
        unseen = place[:end] > place[end - (last - first) : end, None]
        weights = scores.mul_(scale).masked_fill_(unseen, -torch.inf).softmax(-1)
        sums[:, :, :end] += weights.sum((2, 3))


def last_query_sums(k: Tensor, last_queries: Tensor, count: int, scale: float) -> Tensor:
    """The column sums of the last ``count`` queries of a context: k [B, Hkv, L, D] -> float32 [B, Hkv, L]."""
    sums = k.new_zeros(k.shape[:3], dtype=torch.float32)
    add_column_sums(sums, last_queries[:, :, -count:], k, scale)
    return sums
