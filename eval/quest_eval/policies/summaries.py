"""What Quest keeps of a page to score it by, behind one operator: :func:`quest_ops.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ...bounds import update_mean_std_bounds
from ...ops import estimate, update_bounds
from ...views import empty_bounds

if TYPE_CHECKING:
    from torch import Tensor

    from ...views import PageView
    from .base import KVShape

Bounds = Literal["minmax", "meanstd", "int8"]


class Summaries:
    """The summaries of a layer's pages."""

    def __init__(self, view: PageView, seq_lens: Tensor, page_size: int, bounds: Bounds) -> None:
        self._view, self._seq_lens, self._page_size, self._kind = view, seq_lens, page_size, bounds
        self._bounds = empty_bounds(view)
        self._scales: dict[str, Tensor] = {}
        if bounds == "int8":
            self._bounds = torch.empty_strided(
                self._bounds.shape, self._bounds.stride(), dtype=torch.int8, device=self._bounds.device
            )
            self._scales = {"k_scales": torch.empty(self._bounds.shape[:2], device=self._bounds.device)}
        self._update(whole=True)

    def append(self) -> None:
        """Take in the newest token of each sequence."""
        self._update(whole=False)

    def scores(self, q: Tensor) -> Tensor:
        """float32 [B, H, P] of q [B, H, D]."""
        return estimate(q, self._bounds, self._view.page_table, self._seq_lens, self._page_size, **self._scales)

    def _update(self, whole: bool) -> None:
        where = (self._view.k_cache, self._bounds, self._view.page_table, self._seq_lens)
        if self._kind == "meanstd":
            update_mean_std_bounds(*where, num_new=None if whole else 1)
        else:
            update_bounds(*where, None if whole else self._seq_lens - 1, **self._scales)


def page_bytes(shape: KVShape, bounds: Bounds) -> int:
    """Bytes of one page's summary, all KV heads."""
    elements = 2 * shape.kv_heads * shape.head_dim
    return elements + 4 * shape.kv_heads if bounds == "int8" else elements * shape.itemsize
