"""The best choice there is by exact scores, which a better estimate could reach at the same budget.

An oracle is no method, as it reads every key to choose. Each query head has a list of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import pad

from . import tokens
from .base import KVShape, LayerKV, LayerReader, Policy
from .pages import PagePolicy, PageReader

if TYPE_CHECKING:
    from torch import Tensor

    from ..library import GroupReduce


class PageOracleReader(PageReader):
    def scores(self, q: Tensor) -> Tensor:
        length, S = self.kv.length.tokens, self.policy.page_size
        exact = tokens.scores(q, self.kv.k[:, :, :length], self.kv.scale)
        return pad(exact, (0, self.kv.k.shape[2] - length), value=-math.inf).unflatten(-1, (-1, S)).amax(-1)


@dataclass(frozen=True)
class PageOracle(PagePolicy):
    """The pages that hold the best scores, and the last page: Quest with an estimate that is never off."""

    group_reduce: GroupReduce = "none"

    def label(self) -> str:
        return f"oracle, pages{self.forced_label()}"

    def start(self, kv: LayerKV) -> PageOracleReader:
        return PageOracleReader(kv, self)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        return _bytes_read(self, shape, context, length)


class TokenOracleReader(LayerReader):
    def __init__(self, kv: LayerKV, budget: int) -> None:
        super().__init__(kv)
        self._budget = budget

    def attend(self, q: Tensor) -> Tensor:
        kv, length = self.kv, self.kv.length.tokens
        exact = tokens.scores(q, kv.k[:, :, :length], kv.scale)
        best = exact.topk(min(self._budget, length), -1)
        self.tokens = best.indices
        values = tokens.gather(kv.v, self.tokens).float()  # [B, Hq, n, D]
        out = best.values.softmax(-1)[:, :, None] @ values
        return out[:, :, 0].to(q.dtype)


@dataclass(frozen=True)
class TokenOracle(Policy):
    """The tokens of the best scores."""

    def label(self) -> str:
        return "oracle, tokens"

    def start(self, kv: LayerKV) -> TokenOracleReader:
        return TokenOracleReader(kv, self.limit)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        return _bytes_read(self, shape, context, length)


def _bytes_read(policy: Policy, shape: KVShape, context: int, length: int) -> int:
    """All keys, and for each query head the values of the tokens that it attends to."""
    lists = shape.query_heads // shape.kv_heads
    return (length + lists * policy.tokens_attended(context, length)) * shape.token_bytes // 2
