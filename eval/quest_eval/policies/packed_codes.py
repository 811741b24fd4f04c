"""The codes of keys that the operators of quest_ops keep and score by, in 2 bits a dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from quest_ops.ops import append_codes, rerank_pages

from ..library import bytes_of_codes, new_codes

if TYPE_CHECKING:
    from quest_ops import PageView
    from torch import Tensor

    from .base import KVShape, LayerKV


class PackedCodes:
    """The codes of a layer's keys, kept up to date as tokens arrive."""

    def __init__(self, kv: LayerKV, view: PageView) -> None:
        self._kv, self._view = kv, view
        *pool, head_dim = view.k_cache.shape
        self._codes, self._scales = new_codes(tuple(pool), head_dim, view.k_cache.device)
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


def bytes_of_token(shape: KVShape) -> int:
    """Bytes of one token's code, all KV heads, with its scale in float32."""
    return shape.kv_heads * bytes_of_codes(shape.head_dim)
