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
        count, kv_heads = self.policy.num_pages, self.kv.k.shape[1]
        lengths = self.kv.length.seq_lens
        return topk_pages(self.scores(q), lengths, self.policy.page_size, count, kv_heads, "max", 1, count - 1)


@dataclass(frozen=True)
class Window(PagePolicy):
    def label(self) -> str:
        return "window"

    def start(self, kv: LayerKV) -> WindowReader:
        return WindowReader(kv, self)

    @property
    def least_budget(self) -> int:
        return 2 * self.page_size
