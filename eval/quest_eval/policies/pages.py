"""Policies that give each page a score and attend to the best pages, by the operators of quest_ops."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quest_ops import sparse_decode, topk_pages

from ..library import PAGE_SIZES
from .base import KVShape, LayerKV, LayerReader, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from ..library import GroupReduce


class PageReader(LayerReader):
    """Scores, selects and attends. A subclass defines :meth:`scores`."""

    def __init__(self, kv: LayerKV, policy: PagePolicy) -> None:
        super().__init__(kv)
        self.policy, self.view = policy, kv.pages(policy.page_size)

    def attend(self, q: Tensor) -> Tensor:
        self.pages = self.select(q)
        return sparse_decode(q, *self.view, self.kv.length.seq_lens, self.pages, self.kv.scale)[0]

    @abstractmethod
    def scores(self, q: Tensor) -> Tensor:
        """A score for each page, higher is better: q [B, Hq, D] -> [B, Hq, P].

        P counts the pages of the capacity, or those in use. Scores of pages past the last have no effect. Those of
        sinks and recent pages have none either: the policy forces them, by default the last page.
        """

    def select(self, q: Tensor) -> Tensor:
        """The pages to attend to: q [B, Hq, D] -> int32 [B, Hs, K] logical pages, ascending, -1 padded."""
        return self.best(self.scores(q).float(), self.policy.num_pages)

    def best(self, scores: Tensor, count: int) -> Tensor:
        """The ``count`` best pages, the forced ones included: scores [B, Hq, P] -> int32 [B, Hs, count]."""
        policy, kv = self.policy, self.kv
        return topk_pages(
            scores,
            kv.length.seq_lens,
            policy.page_size,
            count,
            kv.k.shape[1],
            policy.group_reduce,
            policy.sink_pages,
            policy.recent_pages,
            kv.scale,
        )


@dataclass(frozen=True)
class PagePolicy(Policy):
    """A policy whose budget is a number of pages.

    Args:
        group_reduce: how the query heads of a KV head agree on pages, see :func:`quest_ops.topk_pages`.
        sink_pages: first pages that are always read, counted in the budget.
        recent_pages: last pages that are always read, counted in the budget; 1 keeps the page being written.

    Raises:
        ValueError: a page size that the operators lack, or a negative number of forced pages.
    """

    group_reduce: GroupReduce = "max"
    sink_pages: int = 0
    recent_pages: int = 1

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {self.page_size}")
        for name in ("sink_pages", "recent_pages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @abstractmethod
    def start(self, kv: LayerKV) -> PageReader: ...

    def forced_label(self) -> str:
        """The forced pages, where they are not the default's, as the end of a label."""
        sinks = f", sink {self.sink_pages}" if self.sink_pages else ""
        return sinks + (f", recent {self.recent_pages}" if self.recent_pages != 1 else "")

    @property
    def num_pages(self) -> int:
        return self.limit // self.page_size

    @property
    def least_budget(self) -> int:
        return max(1, self.sink_pages + self.recent_pages) * self.page_size

    def page_bytes(self, shape: KVShape) -> int:  # noqa: ARG002
        """Bytes that are kept of a page to score it by, and read in each step, all KV heads; 0 by default."""
        return 0

    def lists(self, shape: KVShape) -> int:
        """Lists of pages for each KV head. Each is read by itself: a page in two of them counts twice."""
        return shape.query_heads // shape.kv_heads if self.group_reduce == "none" else 1

    def tokens_attended(self, context: int, length: int) -> int:  # noqa: ARG002
        pages = math.ceil(length / self.page_size)
        # The last page is among them, and only the tokens it has are read. With ``recent_pages=0`` it may not be.
        return length - max(0, pages - self.num_pages) * self.page_size

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        attended = self.lists(shape) * self.tokens_attended(context, length) * shape.token_bytes
        return attended + math.ceil(length / self.page_size) * self.page_bytes(shape)

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:  # noqa: ARG002
        return length * shape.token_bytes + math.ceil(length / self.page_size) * self.page_bytes(shape)
