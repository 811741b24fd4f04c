"""Observers of a policy at work: its attention mass and its pages, in each layer and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention_mass import attention_mass

if TYPE_CHECKING:
    from ..policies import LayerKV, Policy


@dataclass(frozen=True)
class StepInfo:
    """One layer in one step. Its tensors are the decoder's own: an observer neither keeps nor changes them."""

    policy: Policy
    #: Tokens in each sequence, the one being decoded included.
    length: int
    #: [B, Hq, D].
    q: Tensor
    kv: LayerKV
    #: Logical pages int32 [B, Hs, K], -1 padded, or tokens int64 [B, Hs, n], Hs = 1 (one list for all heads), Hkv or
    #: Hq. Both are None where everything was read.
    pages: Tensor | None
    tokens: Tensor | None

    def recall(self) -> Tensor:
        """float32 [B, Hq]: the share of dense attention's weights that falls on the selection. Reads all keys."""
        k = self.kv.k[:, :, : self.length]
        return attention_mass(self.q, k, self.kv.scale, self.pages, self.tokens, self.policy.page_size)


#: Called in each layer and decoding step with the layer's number.
Observer = Callable[[int, StepInfo], None]


class Recall:
    """The mean share of dense attention's weights that falls on the selection, by layer and head."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}

    def __call__(self, layer: int, info: StepInfo) -> None:
        kept = info.recall().mean(0)
        self._sums[layer] = self._sums[layer] + kept if layer in self._sums else kept
        self._steps[layer] = self._steps.get(layer, 0) + 1

    def by_head(self) -> Tensor:
        """float32 [L, Hq] on the CPU, a mean over steps and sequences."""
        return torch.stack([self._sums[layer] / self._steps[layer] for layer in sorted(self._sums)]).cpu()


class PagesRead:
    """The pages of each step, in each layer that reads pages; of one sequence."""

    def __init__(self) -> None:
        self._lists: dict[int, list[Tensor]] = {}  # of each layer and step [Hs, K], -1 padded

    def __call__(self, layer: int, info: StepInfo) -> None:
        if info.pages is not None:
            self._lists.setdefault(layer, []).append(info.pages[0].clone())

    def over_time(self, num_pages: int) -> dict[int, Tensor]:
        """For each layer float32 [steps, num_pages]: the share of a step's lists that a page is in."""
        return {
            layer: torch.stack([_reads(one, num_pages).mean(0) for one in lists])
            for layer, lists in self._lists.items()
        }

    def by_head(self, num_pages: int, kv_heads: int, steps: int) -> dict[int, Tensor]:
        """For each layer int64 [kv_heads, num_pages]: how often the last ``steps`` steps read a page.

        A list of a query head counts for the KV head that it reads from.
        """
        return {
            layer: sum_of.unflatten(0, (kv_heads, -1)).sum(1).long()
            for layer, lists in self._lists.items()
            for sum_of in [torch.stack([_reads(one, num_pages) for one in lists[-steps:]]).sum(0)]
        }


def _reads(lists: Tensor, num_pages: int) -> Tensor:
    """Lists of pages [Hs, K], -1 padded -> float32 [Hs, num_pages], 1 where a page is in a list."""
    found = torch.zeros(len(lists), num_pages + 1)
    return found.scatter_(1, lists.long().cpu() + 1, 1.0)[:, 1:]
