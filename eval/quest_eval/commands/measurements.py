"""Policies measured at the end of a text: the attention mass that they keep, and perplexity over dense attention's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import models
from ..decoding.observers import Recall
from ..decoding.policy_decoder import PolicyDecoder
from .checks import make_policies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from torch import Tensor

    from ..decoding.kv_usage import KVUsage
    from ..decoding.prefill_store import PrefillStore
    from ..policies import Policy
    from ..tasks import Sample


@dataclass(frozen=True)
class Measured:
    """A policy's attention mass and loss.

    Attributes:
        mass: float32 [L, Hq], the share of dense attention's weights that it keeps; None where it was not asked for.
        ratio: perplexity over dense attention's.
        error: standard error of the ratio.
        usage: of the KV cache.
    """

    mass: Tensor | None
    ratio: float
    error: float
    usage: KVUsage


class Measurements:
    """A model that has read a text but for its end, which each policy decodes.

    Args:
        files: of the model.
        sample: the text.
        length: tokens of the text.
        device: to run on.
        store: of prefills, or None.
        policies: those to measure.
        console: shows the progress.
    """

    def __init__(
        self,
        files: models.ModelFiles,
        sample: Sample,
        length: int,
        device: str,
        store: PrefillStore | None,
        policies: Sequence[Policy],
        console: Console,
    ) -> None:
        model = models.load(files, device, models.DTYPES[device])
        fingerprint = "" if store is None else models.fingerprint(model)
        self.decoder = PolicyDecoder(model, max_tokens=length + 1, store=store, fingerprint=fingerprint)
        ids, dense = torch.tensor([sample.ids]), make_policies(("dense",), [64], 16, 0)[0]
        self._tail = ids[:, -sample.tail :]
        with console.status("reading the text"):
            self.decoder.prefill(ids[:, : -sample.tail], policies=[dense, *policies])
        self._of_dense = self.decoder.score(dense, self._tail)
        self.dense_perplexity = math.exp(-float(self._of_dense.mean()))

    def of(self, policy: Policy, *, mass: bool = True) -> Measured:
        """Decode the end of the text under a policy; ``mass`` reads all keys once more."""
        recall = Recall()
        self.decoder.observer = recall if mass else None
        lost = self._of_dense - self.decoder.score(policy, self._tail)
        self.decoder.observer = None
        ratio = math.exp(float(lost.mean()))
        error = ratio * float(lost.std()) / math.sqrt(lost.numel())
        return Measured(recall.by_head() if mass else None, ratio, error, self.decoder.usage(policy))
