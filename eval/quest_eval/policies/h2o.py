"""H2O: the tokens that have received most attention, and the latest.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .eviction import Evicting, EvictingReader, best, with_recent, without

if TYPE_CHECKING:
    from torch import Tensor

    from .base import LayerKV


class H2OReader(EvictingReader):
    """Scores are the attention received of all queries since the context's first; an evicted token's are lost."""

    def __init__(self, kv: LayerKV, policy: H2O) -> None:
        if kv.column_sums is None:
            raise ValueError("policy h2o needs what the prefill notes for it: give it to PolicyDecoder.prefill as well")
        # The next token is the latest of all, so one place of the recent ones stays free between steps.
        self._recent = policy.recent - 1
        heavy = min(policy.heavy, max(0, kv.context - self._recent))
        first_recent = max(0, kv.context - self._recent)
        kept = with_recent(best(kv.column_sums[:, :, :first_recent], heavy), first_recent, kv.context)
        super().__init__(kv, kept, policy.budget)
        self._scores = kv.column_sums.gather(-1, kept)

    def judge(self, weights: Tensor, full: bool) -> Tensor | None:
        received = weights.unflatten(1, (self._scores.shape[1], -1)).sum(2)
        received[..., :-1] += self._scores
        if not full:
            self._scores = received
            return None
        dropped = received[..., : received.shape[-1] - self._recent].argmin(-1, keepdim=True)
        self._scores = without(received, dropped)
        return dropped


@dataclass(frozen=True)
class H2O(Evicting):
    """Half of the budget for heavy hitters, half for the latest tokens, as in the authors' experiments.

    Each KV head keeps tokens of its own. Query heads that share one add up their attention, since only a token that
    all of them drop frees memory. With a KV head for each query head that is the authors' definition.
    """

    needs_column_sums: ClassVar[bool] = True

    @property
    def heavy(self) -> int:
        return self.limit // 2

    @property
    def recent(self) -> int:
        return self.limit - self.heavy

    def label(self) -> str:
        return "H2O"

    def start(self, kv: LayerKV) -> H2OReader:
        return H2OReader(kv, self)
