"""Lists of pages that sequences keep for some steps, as in LServe (Yang et al., MLSys 2025)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeptPages(NamedTuple):
    """The lists of a cache, for ``QuestConfig.reselect_every``.

    Attributes:
        lists: [B, Hkv, K] int32 for each layer, as ``kept_pages`` of :func:`quest_ops.decode_step`. A tensor for each:
            inductor (torch 2.13) writes to no view whose offset depends on a symbolic B.
        steps: [B] int32, as ``kept_steps`` of :func:`quest_ops.decode_step`. After a step of one token in each sequence
            it is the place of the sequence's newest token in its page. So a sequence selects where a page begins: the
            page before it is no longer among those that are always read, and would be lost to the list. After any other
            change of the sequences it is -1, and 0 in the step after that, so that all select there.
    """

    lists: list[Tensor]
    steps: Tensor

    @classmethod
    def allocate(
        cls, num_layers: int, batch_size: int, num_kv_heads: int, num_pages: int, device: torch.device
    ) -> KeptPages:
        """Room for lists of ``num_pages`` pages."""
        shape = (batch_size, num_kv_heads, num_pages)
        lists = [torch.full(shape, -1, dtype=torch.int32, device=device) for _ in range(num_layers)]
        return cls(lists, torch.full((batch_size,), -1, dtype=torch.int32, device=device))

    def after(self, seq_lens: Tensor | None, page_size: int) -> Tensor:
        """The steps after one token in each sequence, with seq_lens [B] tokens then, or after another change: None."""
        if seq_lens is None:
            return torch.full_like(self.steps, -1)
        return torch.where(self.steps < 0, 0, (seq_lens - 1) % page_size)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.lists, self.steps]

    def selects(self, reselect_every: int) -> Tensor:
        """Bool [B]: the sequences that select pages in this step."""
        return self.steps % reselect_every == 0
