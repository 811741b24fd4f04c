"""Quest through the operators themselves: page summaries, estimate, topk_pages, sparse_decode (Tang et al., "Quest:
Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024), with its choices as fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...attention import QuestConfig
from ...ops import GroupReduce, sparse_decode, topk_pages
from .base import KVShape, LayerKV, LayerReader, Policy
from .summaries import Bounds, Summaries, page_bytes

if TYPE_CHECKING:
    from torch import Tensor


class QuestReader(LayerReader):
    def __init__(self, kv: LayerKV, policy: Quest) -> None:
        super().__init__(kv)
        self.policy, self._view = policy, kv.pages(policy.page_size)
        self._summaries = Summaries(self._view, kv.length.seq_lens, policy.page_size, policy.bounds)

    def attend(self, q: Tensor) -> Tensor:
        self._summaries.append()
        self.pages = self._select(q)
        out, _ = sparse_decode(q, *self._view, self.kv.length.seq_lens, self.pages, self.kv.scale)
        return out

    def _select(self, q: Tensor) -> Tensor:
        policy, kv_heads = self.policy, self.kv.k.shape[1]
        where = (self.kv.length.seq_lens, policy.page_size, policy.num_pages)
        if policy.shared:
            # A query for each KV head, the mean of its group, and one score a page for all heads.
            means = q.unflatten(1, (kv_heads, -1)).mean(2)
            pages = topk_pages(self._summaries.scores(means), *where, 1, "sum")
            return pages.expand(-1, kv_heads, -1).contiguous()
        scores = self._summaries.scores(q)
        return topk_pages(scores, *where, kv_heads, policy.group_reduce, scale=self.kv.scale)


@dataclass(frozen=True)
class Quest(Policy):
    """Quest.

    Args:
        group_reduce: how the query heads of a KV head agree on pages, see :func:`quest_ops.topk_pages`; "none" is the
            paper's.
        shared: one list for all heads: of the scores of the groups' mean queries, summed over the KV heads. It is what
            SGLang's QuestAlgorithm does.
        bounds: "minmax" (the paper's), "meanstd" (:mod:`quest_ops.bounds`) or "int8".
    """

    group_reduce: GroupReduce = "max"
    shared: bool = False
    bounds: Bounds = "minmax"

    def __post_init__(self) -> None:
        # Says in one sentence what is wrong with the numbers.
        QuestConfig(self.tokens, self.page_size, group_reduce=self.group_reduce, dense_layers=self.dense_layers)

    @property
    def tokens(self) -> int:
        assert self.budget is not None
        return self.budget

    @property
    def num_pages(self) -> int:
        return self.tokens // self.page_size

    def label(self) -> str:
        who = "one list" if self.shared else {"none": "per head"}.get(self.group_reduce, self.group_reduce)
        bounds = {"minmax": "", "meanstd": ", mean ± std", "int8": ", int8"}[self.bounds]
        return f"Quest, {who}{bounds}{'' if self.dense_layers else ', no dense layers'}"

    def start(self, kv: LayerKV) -> QuestReader:
        return QuestReader(kv, self)

    def tokens_attended(self, context: int, length: int) -> int:  # noqa: ARG002
        pages = math.ceil(length / self.page_size)
        # The last page is always among them, and only the tokens it has are read.
        return length - max(0, pages - self.num_pages) * self.page_size

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        """A list of each query head is read by itself: what heads of a group have in common counts as often."""
        lists = shape.query_heads // shape.kv_heads if self.group_reduce == "none" and not self.shared else 1
        pages = math.ceil(length / self.page_size)
        read = lists * self.tokens_attended(context, length) * shape.token_bytes
        return read + pages * page_bytes(shape, self.bounds)

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:  # noqa: ARG002
        return length * shape.token_bytes + math.ceil(length / self.page_size) * page_bytes(shape, self.bounds)
