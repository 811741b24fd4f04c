"""Tokens and bytes of the KV cache that a policy reads and holds, counted from lengths alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..policies import KVShape, Policy


@dataclass(frozen=True)
class KVUsage:
    """The use of the KV cache by one sequence while it is decoded.

    Attributes:
        tokens_attended: tokens a head attends to in the layers that the policy rules, a mean over the decoding steps.
        kv_bytes_read: keys, values and metadata (bounds) read, a mean over steps and full-attention layers, dense ones
            included.
        kv_bytes_held: keys, values and metadata that are kept at the end, a mean over full-attention layers.
        kv_bytes_dense: keys and values that dense attention reads in a layer, a mean over steps.
    """

    tokens_attended: float
    kv_bytes_read: float
    kv_bytes_held: float
    kv_bytes_dense: float


def kv_usage(policy: Policy, shape: KVShape, layers: Sequence[int], context: int, length: int) -> KVUsage:
    """The usage of the steps that take a sequence from ``context`` tokens to ``length``.

    ``layers`` are the numbers of the full-attention layers, the only ones that count: a sliding layer reads its window
    under every policy.

    Without a step (the score of a single token) nothing is read: it counts as a first step would.
    """
    lengths = range(context + 1, max(length, context + 1) + 1)
    end = lengths[-1]
    ruled = Counter(policy.at(layer) for layer in layers if not policy.is_dense(layer))
    dense_share = 1 - ruled.total() / len(layers)

    def mean_over_ruled(count: Callable[[Policy], float]) -> float:
        kinds = ruled or Counter([policy.at(layers[0])])  # a policy that rules no layer counts as if it ruled one
        return fmean(value for kind, number in kinds.items() for value in [count(kind)] * number)

    def mean_over_layers(dense: float, count: Callable[[Policy], float]) -> float:
        return dense_share * dense + (1 - dense_share) * mean_over_ruled(count)

    dense_read = fmean(n * shape.token_bytes for n in lengths)
    return KVUsage(
        tokens_attended=mean_over_ruled(lambda kind: fmean(kind.tokens_attended(context, n) for n in lengths)),
        kv_bytes_read=mean_over_layers(
            dense_read, lambda kind: fmean(kind.bytes_read(shape, context, n) for n in lengths)
        ),
        kv_bytes_held=mean_over_layers(end * shape.token_bytes, lambda kind: kind.bytes_held(shape, context, end)),
        kv_bytes_dense=dense_read,
    )
