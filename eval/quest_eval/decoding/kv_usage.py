"""What a policy reads and holds, counted from lengths alone."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .policies import KVShape, Policy


@dataclass(frozen=True)
class Usage:
    """What a run read and held, of one sequence.

    Attributes:
        tokens_attended: a mean over the decoding steps: tokens a head attends to in the layers that the policy rules.
        kv_bytes_read: a mean over steps and layers, dense ones included: keys, values and metadata (bounds) read.
        kv_bytes_held: a mean over layers: keys, values and metadata that are kept at the end.
        kv_bytes_dense: what dense attention would have read: a mean over steps, of one layer.
    """

    tokens_attended: float
    kv_bytes_read: float
    kv_bytes_held: float
    kv_bytes_dense: float


def measure(policy: Policy, shape: KVShape, num_layers: int, context: int, length: int) -> Usage:
    """The usage of a run that began behind ``context`` tokens and ended with ``length``.

    A run without a step (the score of a single token) read nothing: it counts as its first step would.
    """
    lengths = range(context + 1, max(length, context + 1) + 1)
    end = lengths[-1]
    dense_share = min(policy.dense_layers, num_layers) / num_layers

    def mean_over_layers(dense: float, ruled: float) -> float:
        return dense_share * dense + (1 - dense_share) * ruled

    dense_read = fmean(n * shape.token_bytes for n in lengths)
    return Usage(
        tokens_attended=fmean(policy.tokens_attended(context, n) for n in lengths),
        kv_bytes_read=mean_over_layers(dense_read, fmean(policy.bytes_read(shape, context, n) for n in lengths)),
        kv_bytes_held=mean_over_layers(end * shape.token_bytes, policy.bytes_held(shape, context, end)),
        kv_bytes_dense=dense_read,
    )
