"""What a policy reads while it decodes: attention mass by layer and head, and pages over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .steps import StepInfo


class Recall:
    """An observer of a session: the mean part of dense attention's weights that falls on what was read."""

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


class PagesOverTime:
    """An observer of a session of one sequence: the pages of each step, as lists of each layer that reads pages."""

    def __init__(self) -> None:
        self._lists: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, info: StepInfo) -> None:
        if info.pages is not None:
            self._lists.setdefault(layer, []).append(info.pages[0].clone())

    def by_layer(self, num_pages: int) -> dict[int, Tensor]:
        """For each layer float32 [steps, num_pages]: the part of its lists in which a page is."""
        return {layer: torch.stack([_shares(one, num_pages) for one in found]) for layer, found in self._lists.items()}


def _shares(lists: Tensor, num_pages: int) -> Tensor:
    """Lists [Hs, K], -1 padded -> [num_pages]."""
    counts = torch.zeros(num_pages + 1).index_add_(0, lists.flatten().long().cpu() + 1, torch.ones(lists.numel()))
    return counts[1:] / lists.shape[0]
