"""Pages by any summary, and a second stage by codes of their keys: an emulation, to find out which kernels pay.

One policy covers the variants by its fields. Selection and attention are those of the operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from quest_ops import topk_pages
from torch.nn.functional import pad

from . import key_codes, summaries
from .key_codes import KeyCodes
from .pages import PagePolicy, PageReader
from .summaries import PageSummaries, Summary

if TYPE_CHECKING:
    from torch import Tensor

    from ..library import GroupReduce
    from .base import KVShape, LayerKV


class PageSummaryReader(PageReader):
    policy: PageSummaryPolicy

    def __init__(self, kv: LayerKV, policy: PageSummaryPolicy) -> None:
        super().__init__(kv, policy)
        how = policy.summary, policy.factor, policy.bits
        self._summaries = PageSummaries(kv.k, kv.length.tokens, policy.page_size, *how)
        self._codes = None if policy.code_bits is None else KeyCodes(kv.k, kv.length.tokens, policy.code_bits)

    def attend(self, q: Tensor) -> Tensor:
        self._summaries.append(self.kv.length.tokens)
        if self._codes is not None:
            self._codes.append(self.kv.length.tokens)
        return super().attend(q)

    def scores(self, q: Tensor) -> Tensor:
        return self._summaries.scores(q, self.kv.length.tokens)

    def select(self, q: Tensor) -> Tensor:
        if self._codes is None:
            return super().select(q)
        policy = self.policy
        kept = self._best(self.scores(q), policy.pages_kept(self.kv.length.tokens), policy.group_reduce)
        scores = self._rerank(self._codes.scores(q, self.kv.length.tokens) * self.kv.scale)
        lists = torch.zeros((*kept.shape[:2], scores.shape[-1] + 1), dtype=torch.bool, device=q.device)
        lists = lists.scatter_(-1, kept.long() + 1, True)[..., 1:]  # -1 pads
        scores = scores.masked_fill(~lists.repeat_interleave(q.shape[1] // kept.shape[1], 1), -math.inf)
        return self._best(scores / self.kv.scale, policy.num_pages, policy.rerank_group)

    def _best(self, scores: Tensor, count: int, group_reduce: GroupReduce) -> Tensor:
        policy, kv_heads = self.policy, self.kv.k.shape[1]
        forced = policy.sink_pages, policy.recent_pages
        lens = self.kv.length.seq_lens
        return topk_pages(scores, lens, policy.page_size, count, kv_heads, group_reduce, *forced, self.kv.scale)

    def _rerank(self, scores: Tensor) -> Tensor:
        """The scores of tokens [B, Hq, L], scaled, as scores of pages [B, Hq, P]."""
        page_size = self.policy.page_size
        pages = pad(scores, (0, -scores.shape[-1] % page_size), value=-math.inf).unflatten(-1, (-1, page_size))
        return pages.amax(-1) if self.policy.rerank == "max" else pages.logsumexp(-1)


@dataclass(frozen=True)
class PageSummaryPolicy(PagePolicy):
    """Pages by a summary; with ``code_bits``, a second stage chooses among those that the first keeps.

    The first stage keeps the share ``keep`` of the pages by the summary's score, but no fewer than the budget holds.
    The query heads of a group agree on them by ``group_reduce``. The second stage scores the kept pages' tokens by
    their codes. A page's score is the largest of its tokens' ("max"), or the log-sum-exp of the scaled ones ("lse").
    The query heads then agree by "max" or "soft" respectively, unless ``group_reduce="none"`` gives each its own list.

    Args:
        summary: "minmax", "mean_std" or "mean_var", see :mod:`quest_eval.policies.summaries`.
        factor: of the half width or the standard deviation.
        bits: 8 or 4, of the summary; None: the cache's dtype.
        keep: the share of pages that the first stage keeps.
        code_bits: 1 to 4, of the second stage's codes; None: there is no second stage.
        rerank: how tokens make a page's score.

    Raises:
        ValueError: a number out of its range.
    """

    sink_pages: int = 1
    summary: Summary = "mean_std"
    factor: float = 1.0
    bits: int | None = 8
    keep: float = 0.25
    code_bits: int | None = None
    rerank: Literal["max", "lse"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 0:
            raise ValueError(f"factor must be at least 0, got {self.factor}")
        if self.bits not in (None, 8, 4):
            raise ValueError(f"bits must be 8, 4 or none (the cache's dtype), got {self.bits}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        if self.code_bits not in (None, 1, 2, 3, 4):
            raise ValueError(f"code_bits must be from 1 to 4 or none (no second stage), got {self.code_bits}")

    @property
    def rerank_group(self) -> GroupReduce:
        """How query heads agree on the second stage's scores."""
        if self.group_reduce == "none":
            return "none"
        return "max" if self.rerank == "max" else "soft"

    def label(self) -> str:
        width = "" if self.factor == 1 else f"{self.factor:g} "
        name = {"minmax": f"{width}min/max", "mean_std": f"mean ± {width}std", "mean_var": f"mean, {width}variance"}
        first = f"{name[self.summary]}{'' if self.bits is None else f' {self.bits} bits'}, {self.group_reduce}"
        second = "" if self.code_bits is None else f", {self.keep:.4g} by {self.code_bits} bits {self.rerank}"
        sizes = "" if self.page_size == 16 else f", pages of {self.page_size}"
        return f"{first}{second}{sizes}{self.forced_label()}{'' if self.dense_layers else ', no dense layers'}"

    def start(self, kv: LayerKV) -> PageSummaryReader:
        return PageSummaryReader(kv, self)

    def pages_kept(self, length: int) -> int:
        """Pages that the first stage hands to the second."""
        return max(self.num_pages, math.ceil(self.keep * math.ceil(length / self.page_size)))

    def page_bytes(self, shape: KVShape) -> int:
        return shape.kv_heads * summaries.page_bytes(shape.head_dim, shape.itemsize, self.bits)

    def code_bytes(self, shape: KVShape, tokens: int) -> int:
        """Bytes of the codes of that many tokens, all KV heads."""
        if self.code_bits is None:
            return 0
        return tokens * shape.kv_heads * key_codes.token_bytes(shape.head_dim, self.code_bits)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        kept = self.lists(shape) * min(length, self.pages_kept(length) * self.page_size)
        return super().bytes_read(shape, context, length) + self.code_bytes(shape, kept)

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:
        return super().bytes_held(shape, context, length) + self.code_bytes(shape, length)
