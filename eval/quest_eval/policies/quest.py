"""Quest through the operators: page bounds, estimate, topk_pages, sparse_decode.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024. Its variants are fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from quest_ops import QuestConfig, sparse_decode, topk_pages

from .packed_codes import PackedCodes, bytes_of_token
from .page_bounds import PageBounds, bytes_of_page
from .pages import PagePolicy, PageReader

if TYPE_CHECKING:
    from torch import Tensor

    from ..library import BoundsKind
    from .base import KVShape, LayerKV


class QuestReader(PageReader):
    policy: Quest

    def __init__(self, kv: LayerKV, policy: Quest) -> None:
        super().__init__(kv, policy)
        self._bounds = PageBounds(self.view, kv.length.seq_lens, policy.page_size, policy.bounds, policy.std_factor)
        self._codes = PackedCodes(kv, self.view) if policy.candidates else None

    def attend(self, q: Tensor) -> Tensor:
        self._bounds.append()
        if self._codes is not None:
            self._codes.append()
        if self.policy.reads_all(self.kv.length.tokens):
            self.pages = None
            return sparse_decode(q, *self.view, self.kv.length.seq_lens, None, self.kv.scale)[0]
        return super().attend(q)

    def select(self, q: Tensor) -> Tensor:
        policy, tokens = self.policy, self.kv.length.tokens
        step, count = (tokens - 1) % policy.page_size, math.ceil(tokens / policy.page_size)
        if self.pages is None or step % policy.reselect_every == 0 or count <= policy.num_pages:
            return self._select_anew(q)
        newest = torch.arange(count - policy.recent_pages, count, dtype=torch.int32, device=q.device)
        self.pages[..., policy.num_pages - policy.recent_pages :] = newest
        return self.pages

    def scores(self, q: Tensor) -> Tensor:
        scores = self._bounds.estimate(q)
        if self._codes is None:
            return scores
        return self._codes.scores(q, self.best(scores, self.policy.candidates // self.policy.page_size))

    def _select_anew(self, q: Tensor) -> Tensor:
        if not self.policy.shared:
            return super().select(q)
        # The mean query of each group scores the pages of its KV head, and the scores of all heads add up.
        kv_heads = self.kv.k.shape[1]
        scores = self.scores(q.unflatten(1, (kv_heads, -1)).mean(2))
        policy = self.policy
        forced = policy.sink_pages, policy.recent_pages
        pages = topk_pages(scores, self.kv.length.seq_lens, policy.page_size, policy.num_pages, 1, "sum", *forced)
        return pages.expand(-1, kv_heads, -1).contiguous()


@dataclass(frozen=True)
class Quest(PagePolicy):
    """Quest. ``group_reduce="none"`` is the paper's.

    Args:
        shared: one list for all heads: of the scores of the groups' mean queries, summed over the KV heads. SGLang's
            QuestAlgorithm does the same.
        bounds, std_factor, dense_below: as in :class:`quest_ops.QuestConfig`; by default the paper's.
        candidates: as in :class:`quest_ops.QuestConfig`.
        reselect_every: as in :class:`quest_ops.QuestConfig`. Between two selections the list of the last one is read,
            with the newest pages in its last ``recent_pages`` places.

    Raises:
        ValueError: a budget, page size, selection or candidates that :class:`quest_ops.QuestConfig` refuses; candidates
            with ``shared``; a reselect_every below 1.
    """

    shared: bool = False
    bounds: BoundsKind = "cache"
    std_factor: float | None = None
    dense_below: int = 0
    reselect_every: int = 1
    candidates: int = 0

    def __post_init__(self) -> None:
        if self.reselect_every < 1:
            raise ValueError(f"reselect_every must be at least 1, got {self.reselect_every}")
        forced = self.sink_pages, self.recent_pages
        selection = *forced, self.dense_layers, self.group_reduce
        QuestConfig(self.limit, self.page_size, *selection, self.bounds, self.std_factor, candidates=self.candidates)
        if self.candidates and self.shared:
            raise ValueError(f"candidates must be 0 with shared, got {self.candidates}")

    def label(self) -> str:
        who = "one list" if self.shared else {"none": "per head"}.get(self.group_reduce, self.group_reduce)
        factor = "" if self.std_factor == 1 else f"{self.std_factor} "
        bounds = "" if self.std_factor is None else f", mean ± {factor}std"
        bounds += "" if self.bounds == "cache" else f", {self.bounds}"
        bounds += "" if self.page_size == 16 else f", pages of {self.page_size}"
        dense = "" if self.dense_layers else ", no dense layers"
        twice = f", of {self.candidates:,} candidates" if self.candidates else ""
        every = "" if self.reselect_every == 1 else f", each {self.reselect_every} steps"
        return f"Quest, {who}{bounds}{self.forced_label()}{twice}{every}{dense}"

    def reads_all(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens is short enough to be read whole."""
        return length <= self.dense_below

    def tokens_attended(self, context: int, length: int) -> int:
        return length if self.reads_all(length) else super().tokens_attended(context, length)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        if self.reads_all(length):
            return length * shape.token_bytes
        bounds = math.ceil(length / self.page_size) * self.page_bytes(shape)
        codes = self.lists(shape) * min(self.candidates, length) * bytes_of_token(shape)
        once = super().bytes_read(shape, context, length) - bounds
        return once + (bounds + codes) // self.reselect_every

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:
        codes = length * bytes_of_token(shape) if self.candidates else 0
        return super().bytes_held(shape, context, length) + codes

    def start(self, kv: LayerKV) -> QuestReader:
        return QuestReader(kv, self)

    def page_bytes(self, shape: KVShape) -> int:
        return bytes_of_page(shape, self.bounds)

    def lists(self, shape: KVShape) -> int:
        return 1 if self.shared else super().lists(shape)
