"""H2O."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores made at a time: 256 MiB in float32, several times that with what is made of them.
_ELEMENTS = 2**26


def add_column_sums(sums: Tensor, q: Tensor, k: Tensor, scale: float) -> None:
    """Add to ``sums`` what each token receives of the causal attention of some queries, summed over a group's heads.

    Made for a block of queries at a time, so that nothing has the size of the prompt squared.

    Args:
        sums: float32 [B, Hkv, L or more].
        q: [B, Hq, T, D], the last T of the tokens of k.
        k: [B, Hkv, L, D].
        scale: of the scores before the softmax.
    """
    B, Hq, T, _ = q.shape
    Hkv, L = k.shape[1:3]
    block = max(1, min(T, _ELEMENTS // (B * Hq * L)))
    for first in range(0, T, block):
        last = min(first + block, T)
        end = L - T + last
        queries = q[:, :, first:last].unflatten(1, (Hkv, -1))  # [B, Hkv, G, block, D]
        scores = (queries @ k[:, :, None, :end].transpose(-1, -2)).float() * scale
        place = torch.arange(end, device=q.device)
        scores.masked_fill_(place > place[end - (last - first) :, None], -torch.inf)
        sums[:, :, :end] += scores.softmax(-1).sum((2, 3))
