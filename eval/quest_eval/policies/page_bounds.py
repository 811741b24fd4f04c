"""The kinds of page bounds that Quest scores by, behind one operator: :func:`quest_ops.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from quest_ops import empty_bounds, empty_scales, estimate, update_bounds

from ..library import bytes_of_bounds

if TYPE_CHECKING:
    from quest_ops import PageView
    from torch import Tensor

    from ..library import BoundsKind
    from .base import KVShape


class PageBounds:
    """The bounds of a layer's pages, kept up to date as tokens arrive."""

    def __init__(
        self, view: PageView, seq_lens: Tensor, page_size: int, kind: BoundsKind, std_factor: float | None
    ) -> None:
        self._view, self._seq_lens, self._page_size, self._std_factor = view, seq_lens, page_size, std_factor
        self._bounds = empty_bounds(view, kind)
        self._scales = None if kind == "cache" else empty_scales(view)
        self._update(whole=True)

    def append(self) -> None:
        """Take in the newest token of each sequence."""
        self._update(whole=False)

    def estimate(self, q: Tensor) -> Tensor:
        """float32 [B, H, P] of q [B, H, D]."""
        return estimate(q, self._bounds, self._view.page_table, self._seq_lens, self._page_size, self._scales)

    def _update(self, whole: bool) -> None:
        where = (self._view.k_cache, self._bounds, self._view.page_table, self._seq_lens)
        update_bounds(*where, None if whole else self._seq_lens - 1, self._scales, self._std_factor)


def bytes_of_page(shape: KVShape, kind: BoundsKind) -> int:
    """Bytes of one page's bounds, all KV heads, their scales included."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.itemsize]
    return shape.kv_heads * bytes_of_bounds(shape.head_dim, kind, dtype)
