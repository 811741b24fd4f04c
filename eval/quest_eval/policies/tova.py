"""TOVA: each step, the token that the newest query attends to least is dropped.

Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .column_sums import last_query_sums
from .eviction import Evicting, EvictingReader, best

if TYPE_CHECKING:
    from torch import Tensor

    from .base import LayerKV


class TOVAReader(EvictingReader):
    def judge(self, weights: Tensor, full: bool) -> Tensor | None:
        return weights.mean(1, keepdim=True).argmin(-1, keepdim=True) if full else None


@dataclass(frozen=True)
class TOVA(Evicting):
    """One list for all heads of a layer, by the mean of their attention; the latest tokens have no privilege."""

    def label(self) -> str:
        return "TOVA"

    def start(self, kv: LayerKV) -> TOVAReader:
        received = last_query_sums(kv.k[:, :, : kv.context], kv.last_queries, 1, kv.scale).sum(1, keepdim=True)
        # The next token needs a place.
        return TOVAReader(kv, best(received, min(self.limit - 1, kv.context)), self.limit)
