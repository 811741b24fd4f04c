"""The best choice there is by exact scores: what a better estimate could reach at the same budget.

An oracle is no method, as it reads every key to choose. Each query head has a list of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import pad

from ...ops import sparse_decode, topk_pages
from . import tokens
from .base import KVShape, LayerKV, LayerReader, Policy

if TYPE_CHECKING:
    from torch import Tensor


class PageOracleReader(LayerReader):
    def __init__(self, kv: LayerKV, policy: PageOracle) -> None:
        super().__init__(kv)
        self._policy, self._view = policy, kv.pages(policy.page_size)

    def attend(self, q: Tensor) -> Tensor:
        kv, length, S = self.kv, self.kv.length.tokens, self._policy.page_size
        exact = tokens.scores(q, kv.k[:, :, :length], kv.scale)
        scores = pad(exact, (0, kv.k.shape[2] - length), value=-math.inf).unflatten(-1, (-1, S)).amax(-1)
        lens = kv.length.seq_lens
        self.pages = topk_pages(scores, lens, S, self._policy.num_pages, kv.k.shape[1], "none")
        return sparse_decode(q, *self._view, lens, self.pages, kv.scale)[0]


@dataclass(frozen=True)
class PageOracle(Policy):
    """The pages that hold the best scores, and the last page: Quest with an estimate that is never off."""

    @property
    def num_pages(self) -> int:
        assert self.budget is not None
        return self.budget // self.page_size

    def label(self) -> str:
        return "oracle, pages"

    def start(self, kv: LayerKV) -> PageOracleReader:
        return PageOracleReader(kv, self)

    def tokens_attended(self, context: int, length: int) -> int:  # noqa: ARG002
        pages = math.ceil(length / self.page_size)
        return length - max(0, pages - self.num_pages) * self.page_size

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
        assert self.budget is not None
        return TokenOracleReader(kv, self.budget)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        return _bytes_read(self, shape, context, length)


def _bytes_read(policy: Policy, shape: KVShape, context: int, length: int) -> int:
    """All keys, and for each query head the values of what it attends to."""
    lists = shape.query_heads // shape.kv_heads
    return (length + lists * policy.tokens_attended(context, length)) * shape.token_bytes // 2
