"""SparQ: exact attention to the tokens that score best in a few dimensions.

Ribar et al., "SparQ Attention: Bandwidth-Efficient LLM Inference", ICML 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import tokens
from .base import KVShape, LayerKV, LayerReader, Policy

if TYPE_CHECKING:
    from torch import Tensor


class SparQReader(LayerReader):
    def __init__(self, kv: LayerKV, policy: SparQ) -> None:
        super().__init__(kv)
        self._policy = policy
        self._value_sum = kv.v[:, :, : kv.context].sum(2, dtype=torch.float32)  # [B, Hkv, D]

    def attend(self, q: Tensor) -> Tensor:
        kv, length, policy = self.kv, self.kv.length.tokens, self._policy
        Hkv, D = kv.k.shape[1], kv.k.shape[3]
        self._value_sum += kv.v[:, :, length - 1]
        grouped = q.unflatten(1, (Hkv, -1)).float()  # [B, Hkv, G, D]

        dims = grouped.abs().sum(2).topk(policy.rank_of(D), -1).indices  # [B, Hkv, r]
        few = grouped.gather(-1, dims[:, :, None].expand(-1, -1, grouped.shape[2], -1))
        keys = kv.k[:, :, :length].gather(-1, dims[:, :, None].expand(-1, -1, length, -1)).float()
        # Fewer dimensions give scores of less variance: the temperature makes up for the share of |q| left out.
        coverage = few.abs().sum(-1, keepdim=True) / grouped.abs().sum(-1, keepdim=True)
        scores = few @ keys.transpose(-1, -2) * (kv.scale / coverage.sqrt())  # [B, Hkv, G, length]

        ranks = scores.sum(2)
        ranks[..., -policy.local - 1 :] = torch.inf
        self.tokens = ranks.topk(min(policy.limit, length), -1).indices
        share = scores.softmax(-1).gather(-1, self.tokens[:, :, None].expand(-1, -1, grouped.shape[2], -1)).sum(-1)
        share = share.flatten(1, 2)[..., None]  # [B, Hq, 1]
        k, v = (tokens.gather(x, self.tokens) for x in (kv.k, kv.v))
        out, _ = tokens.attend(q.float(), k, v, kv.scale)
        mean = (self._value_sum / length).repeat_interleave(grouped.shape[2], 1)
        return (share * out + (1 - share) * mean).to(q.dtype)


@dataclass(frozen=True)
class SparQ(Policy):
    """One list for each KV head; all other tokens count as the mean of all values.

    Args:
        rank: dimensions that choose, those of the queries' largest components; None: a quarter of head_dim.
    """

    rank: int | None = None

    @property
    def local(self) -> int:
        """Tokens before the newest that are always attended to."""
        return self.limit // 4

    def rank_of(self, head_dim: int) -> int:
        return head_dim // 4 if self.rank is None else self.rank

    def label(self) -> str:
        return "SparQ"

    def start(self, kv: LayerKV) -> SparQReader:
        return SparQReader(kv, self)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        few = length * shape.kv_heads * self.rank_of(shape.head_dim) * shape.itemsize
        return few + self.tokens_attended(context, length) * shape.token_bytes + shape.token_bytes // 2

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:  # noqa: ARG002
        """Keys twice, by tokens and by dimensions, as the authors hold them; values; and their mean."""
        return length * shape.token_bytes * 3 // 2 + shape.token_bytes // 2
