"""The base of policies that evict tokens: a list of the kept ones for each head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import tokens
from .base import KVShape, LayerKV, LayerReader, Policy

if TYPE_CHECKING:
    from torch import Tensor


class EvictingReader(LayerReader):
    """Attends to the kept tokens and the newest; once the budget is full, each step drops one.

    Args:
        kv: the layer.
        kept: int64 [B, Hs, n] ascending, Hs = Hkv or 1 (one list for all heads).
        budget: the most tokens attended to, the newest included; None: kept tokens are kept, and so are new ones.
    """

    def __init__(self, kv: LayerKV, kept: Tensor, budget: int | None) -> None:
        super().__init__(kv)
        self._kept, self._budget = kept, budget

    def attend(self, q: Tensor) -> Tensor:
        kv, length = self.kv, self.kv.length.tokens
        newest = self._kept.new_full((*self._kept.shape[:2], 1), length - 1)
        self.tokens = torch.cat([self._kept, newest], -1)
        k, v = (tokens.gather(x, self.tokens) for x in (kv.k, kv.v))
        out, weights = tokens.attend(q, k, v, kv.scale)
        dropped = self.judge(weights, full=self.tokens.shape[-1] == self._budget)
        self._kept = self.tokens if dropped is None else without(self.tokens, dropped)
        return out

    def judge(self, weights: Tensor, full: bool) -> Tensor | None:  # noqa: ARG002
        """Take note of the step's attention, [B, Hq, n] over ``self.tokens``, and choose a token to drop.

        Returns:
            int64 [B, Hs, 1], an index into ``self.tokens``; None unless the budget is ``full``.
        """
        return None


@dataclass(frozen=True)
class Evicting(Policy):
    """A policy that holds no more than it attends to."""

    @abstractmethod
    def start(self, kv: LayerKV) -> EvictingReader: ...

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:
        return self.tokens_attended(context, length) * shape.token_bytes


def without(lists: Tensor, dropped: Tensor) -> Tensor:
    """Lists [B, Hs, n] without the entry at index ``dropped`` [B, Hs, 1], in their order."""
    place = torch.arange(lists.shape[-1] - 1, device=lists.device).expand(*lists.shape[:-1], -1)
    return lists.gather(-1, place + (place >= dropped))


def best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of highest score, ascending: [B, Hs, L] -> int64 [B, Hs, count]."""
    return scores.topk(count, -1).indices.sort(-1).values


def with_recent(chosen: Tensor, first: int, length: int) -> Tensor:
    """Lists [B, Hs, n] with the tokens from ``first`` to ``length`` behind them."""
    recent = torch.arange(first, length, device=chosen.device)
    return torch.cat([chosen, recent.expand(*chosen.shape[:2], -1)], -1)
