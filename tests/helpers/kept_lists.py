"""The rule of ``QuestConfig.reselect_every``, for selectors in the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def lists_to_read(fresh: Tensor, last: Tensor, seq_lens: Tensor, page_size: int, every: int) -> tuple[Tensor, Tensor]:
    """The lists of a step of one token after another such step, and whether each sequence keeps its own.

    Args:
        fresh: [B, 1, Hs, K], the pages that a selection would choose.
        last: [B, 1, Hs, K], the lists of the step before.
        seq_lens: [B], the new token included.
        page_size: S.
        every: of the configuration, whose recent_pages is 1.
    """
    lengths = seq_lens[:, None, None, None]
    num_pages, kept = -(-lengths // page_size), last.clone()
    kept[..., -1:] = num_pages - 1
    keeps = (num_pages > last.shape[-1]) & ((lengths - 1) % page_size % every != 0)
    return torch.where(keeps, kept, fresh), keeps
