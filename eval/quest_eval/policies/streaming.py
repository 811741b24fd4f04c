"""StreamingLLM: the first tokens and the latest.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from . import tokens
from .base import KVShape, LayerKV, LayerReader, Policy

if TYPE_CHECKING:
    from torch import Tensor

#: First tokens that are kept, as in the paper.
SINKS = 4


class StreamingReader(LayerReader):
    """Positions count the kept tokens alone, as in the paper, which caches keys before RoPE.

    Scores depend on distances alone. Those within the window stay as they were, so only the sinks are rotated. They
    move later by the number of tokens between them and the window.
    """

    def __init__(self, kv: LayerKV, budget: int) -> None:
        super().__init__(kv)
        assert kv.rotate is not None
        self._rotate = kv.rotate
        self._budget = budget

    def attend(self, q: Tensor) -> Tensor:
        kv, length = self.kv, self.kv.length.tokens
        skipped = max(0, length - self._budget)
        sinks, recent = slice(0, min(SINKS, length)), slice(skipped + min(SINKS, length), length)
        self.tokens = torch.arange(length - skipped, device=q.device)
        self.tokens = torch.where(self.tokens < SINKS, self.tokens, self.tokens + skipped).expand(len(q), 1, -1)
        k = torch.cat([self._rotate(kv.k[:, :, sinks].float(), skipped), kv.k[:, :, recent].float()], 2)
        v = torch.cat([kv.v[:, :, sinks], kv.v[:, :, recent]], 2)
        return tokens.attend(q, k, v, kv.scale)[0]


@dataclass(frozen=True)
class Streaming(Policy):
    needs_rotation: ClassVar[bool] = True

    def label(self) -> str:
        return "StreamingLLM"

    def start(self, kv: LayerKV) -> StreamingReader:
        return StreamingReader(kv, self.limit)

    @property
    def least_budget(self) -> int:
        return SINKS + 1

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:
        return self.bytes_read(shape, context, length)
