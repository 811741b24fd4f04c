"""The codes of keys that the operators of quest_ops keep and score by, in 2 bits a dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from quest_ops.ops import append_codes, rerank_pages

if TYPE_CHECKING:
    from quest_ops import PageView
    from torch import Tensor

    from .base import KVShape, LayerKV


class PackedCodes:
    """The codes of a layer's keys, kept up to date as tokens arrive."""

    def __init__(self, kv: LayerKV, view: PageView) -> None:
        self._kv, self._view = kv, view
        pool, device = view.k_cache.shape, view.k_cache.device
        self._codes = torch.zeros((*pool[:3], pool[3] // 4), dtype=torch.uint8, device=device)
        self._scales = torch.zeros(pool[:3], dtype=torch.float32, device=device)
        self._append(0)

    def append(self) -> None:
        """Take in the newest token of each sequence."""
        self._append(self._kv.length.tokens - 1)

    def scores(self, q: Tensor, pages: Tensor) -> Tensor:
        """float32 [B, Hq, P] of q [B, Hq, D], for the listed pages [B, Hs, K] alone."""
        where = (self._codes, self._scales, self._view.page_table, self._kv.length.seq_lens)
        return rerank_pages(q, *where, pages)

    def _append(self, first: int) -> None:
        k = self._kv.k[:, :, first : self._kv.length.tokens].transpose(1, 2)
        before = torch.full_like(self._kv.length.seq_lens, first)
        append_codes(k, self._codes, self._scales, self._view.page_table, before)


def bytes_of_codes(shape: KVShape) -> int:
    """Bytes of one token's code, all KV heads, with its scale in float32."""
    return shape.kv_heads * (shape.head_dim // 4 + torch.float32.itemsize)
