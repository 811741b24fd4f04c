"""Quest without its operators, in float64 and plain PyTorch: the kernels are compared with it on whole answers.

The maths are those of :mod:`quest_ops.reference`, which loops. Here they are vectorised, for equally long sequences in
a contiguous cache. :class:`QuestEmulation` is a policy like any other: model, task and decoder are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import LayerReader, Policy

if TYPE_CHECKING:
    from ..library import GroupReduce
    from .base import LayerKV


def page_bounds(k: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Elementwise minimum and maximum of each page's keys: k [B, Hkv, L, D] -> two of [B, Hkv, P, D]."""
    missing = (0, 0, 0, -k.shape[2] % page_size)
    lower, upper = (pad(k, missing, value=far).unflatten(2, (-1, page_size)) for far in (math.inf, -math.inf))
    return lower.amin(3), upper.amax(3)


def estimate(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """An upper bound of q.k over each page: q [B, Hq, D] -> [B, Hq, P]."""
    grouped = q.unflatten(1, (lower.shape[1], -1))
    scores = grouped.clamp(min=0) @ upper.transpose(-1, -2) + grouped.clamp(max=0) @ lower.transpose(-1, -2)
    return scores.flatten(1, 2)


def reduce_group(scores: Tensor, kv_heads: int, how: GroupReduce, scale: float) -> Tensor:
    """One score a page for the heads that share a list: [B, Hq, P] -> [B, Hs, P]."""
    if how == "none":
        return scores
    grouped = scores.unflatten(1, (kv_heads, -1))
    if how == "max":
        return grouped.amax(2)
    return (grouped if how == "sum" else (grouped * scale).softmax(-1)).sum(2)


def select(scores: Tensor, k: int) -> Tensor:
    """The last page and the k - 1 best others, ascending, ties to the lower page: [B, Hs, P] -> int64 [B, Hs, K]."""
    scores = scores.clone()
    scores[..., -1] = math.inf
    return scores.sort(stable=True, dim=-1, descending=True).indices[..., :k].sort(-1).values


def attend(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_size: int, scale: float) -> Tensor:
    """Softmax attention over the selected pages: q [B, Hq, D], k and v [B, Hkv, L, D] -> [B, Hq, D]."""
    scores = (q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)).flatten(1, 2) * scale
    count = -(-k.shape[2] // page_size)
    chosen = torch.zeros(*pages.shape[:2], count, dtype=torch.bool, device=q.device).scatter_(-1, pages, True)
    seen = chosen.repeat_interleave(page_size, -1)[..., : k.shape[2]]
    seen = seen.repeat_interleave(q.shape[1] // pages.shape[1], 1)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights.unflatten(1, (k.shape[1], -1)) @ v).flatten(1, 2)


@dataclass(frozen=True)
class QuestEmulation(Policy):
    """:class:`quest_eval.policies.quest.Quest` with minimum and maximum, emulated."""

    group_reduce: GroupReduce = "max"

    def label(self) -> str:
        return f"emulation, {self.group_reduce}"

    def start(self, kv: LayerKV) -> EmulationReader:
        return EmulationReader(kv, self)


class EmulationReader(LayerReader):
    #: [B, Hs, P]: the scores by which the last step's pages were chosen.
    scores: Tensor

    def __init__(self, kv: LayerKV, policy: QuestEmulation) -> None:
        super().__init__(kv)
        self._policy = policy

    def attend(self, q: Tensor) -> Tensor:
        kv, policy = self.kv, self._policy
        query, k, v = q.double(), *(x[:, :, : kv.length.tokens].double() for x in (kv.k, kv.v))
        scores = estimate(query, *page_bounds(k, policy.page_size))
        self.scores = reduce_group(scores, k.shape[1], policy.group_reduce, kv.scale)
        self.pages = select(self.scores, policy.limit // policy.page_size)
        return attend(query, k, v, self.pages, policy.page_size, kv.scale).to(q.dtype)
