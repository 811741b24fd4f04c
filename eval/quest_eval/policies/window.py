"""A recent window made of pages: the first page, for its attention sinks, and the latest ones.

StreamingLLM (Xiao et al., ICLR 2024) without its new positions: keys keep those they were computed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from quest_ops import topk_pages

from .pages import PagePolicy, PageReader

if TYPE_CHECKING:
    from torch import Tensor

    from .base import LayerKV


class WindowReader(PageReader):
    def scores(self, q: Tensor) -> Tensor:
        return q.new_zeros((*q.shape[:2], self.view.page_table.shape[1]), dtype=torch.float32)

    def select(self, q: Tensor) -> Tensor:
        """Every page of the list is forced, so that no score decides."""
        count, kv_heads, sinks = self.policy.num_pages, self.kv.k.shape[1], self.policy.sink_pages
        lengths, page_size = self.kv.length.seq_lens, self.policy.page_size
        return topk_pages(self.scores(q), lengths, page_size, count, kv_heads, "max", sinks, count - sinks)


@dataclass(frozen=True)
class Window(PagePolicy):
    """The budget without the sinks is recent, so ``recent_pages`` has no effect."""

    sink_pages: int = 1

    def label(self) -> str:
        return "window" if self.sink_pages == 1 else f"window{self.forced_label()}"

    def start(self, kv: LayerKV) -> WindowReader:
        return WindowReader(kv, self)
