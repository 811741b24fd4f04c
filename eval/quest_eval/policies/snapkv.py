"""SnapKV: tokens of the context are evicted once, by the attention of its last tokens.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from .column_sums import last_query_sums
from .eviction import Evicting, EvictingReader, best, with_recent

if TYPE_CHECKING:
    from .base import LayerKV

#: The context's last tokens, whose attention decides and which are all kept.
WINDOW = 64
#: Neighbours that share their score.
KERNEL = 5


@dataclass(frozen=True)
class SnapKV(Evicting):
    """The budget is for the context, as in the authors' code; decoded tokens are kept on top of it.

    The window has 64 tokens, or half of the budget where that is less. Scores are its mean attention over the query
    heads of a group, averaged over 5 neighbours. The authors' window is the end of the prompt, the question included.
    Here the question comes after the context, as for every policy, and has no say.
    """

    @property
    def window(self) -> int:
        return min(WINDOW, self.limit // 2)

    def label(self) -> str:
        return "SnapKV"

    def start(self, kv: LayerKV) -> EvictingReader:
        B, Hkv = kv.k.shape[:2]
        if kv.context <= self.limit:
            return EvictingReader(kv, torch.arange(kv.context, device=kv.k.device).expand(B, Hkv, -1), None)
        received = last_query_sums(kv.k[:, :, : kv.context], kv.last_queries, self.window, kv.scale)
        before = kv.context - self.window
        smooth = avg_pool1d(received[:, :, :before], KERNEL, 1, KERNEL // 2)
        return EvictingReader(kv, with_recent(best(smooth, self.limit - self.window), before, kv.context), None)

    def tokens_attended(self, context: int, length: int) -> int:
        return min(self.limit, context) + length - context
