"""The kinds of page bounds that Quest scores by, behind one operator: :func:`quest_ops.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from quest_ops import empty_bounds, empty_scales, estimate, update_bounds

from ..library import update_mean_std_bounds

if TYPE_CHECKING:
    from quest_ops import PageView
    from torch import Tensor

    from .base import KVShape

Bounds = Literal["cache", "meanstd", "int8"]


class PageBounds:
    """The bounds of a layer's pages, kept up to date as tokens arrive."""

    def __init__(self, view: PageView, seq_lens: Tensor, page_size: int, kind: Bounds) -> None:
        self._view, self._seq_lens, self._page_size, self._kind = view, seq_lens, page_size, kind
        self._bounds = empty_bounds(view, "int8" if kind == "int8" else "cache")
        self._scales = {"k_scales": empty_scales(view)} if kind == "int8" else {}
        self._update(whole=True)

    def append(self) -> None:
        """Take in the newest token of each sequence."""
        self._update(whole=False)

    def estimate(self, q: Tensor) -> Tensor:
        """float32 [B, H, P] of q [B, H, D]."""
        return estimate(q, self._bounds, self._view.page_table, self._seq_lens, self._page_size, **self._scales)

    def _update(self, whole: bool) -> None:
        where = (self._view.k_cache, self._bounds, self._view.page_table, self._seq_lens)
        if self._kind == "meanstd":
            update_mean_std_bounds(*where, num_new=None if whole else 1)
        else:
            update_bounds(*where, None if whole else self._seq_lens - 1, **self._scales)


def bytes_of_page(shape: KVShape, kind: Bounds) -> int:
    """Bytes of one page's bounds, all KV heads. An int8 page has a float32 scale for each KV head."""
    elements = 2 * shape.kv_heads * shape.head_dim
    return elements + 4 * shape.kv_heads if kind == "int8" else elements * shape.itemsize
