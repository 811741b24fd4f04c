"""The ways to read the cache that the demo compares: all of it, Quest's pages, or a recent window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attention import QuestConfig
from ..page_bounds import bytes_of_bounds

if TYPE_CHECKING:
    import torch

#: Layers that run dense under every sparse policy, as in the paper.
DENSE_LAYERS = 2


@dataclass(frozen=True)
class Policy:
    """A way to read the cache, as a configuration of the same operators.

    A recent window is a selection in which every page is forced: the first page (StreamingLLM's attention sinks; Xiao
    et al., 2023) and the latest ones. Keys keep their positions: nothing is indexed anew.
    """

    name: str
    budget: int | None
    config: QuestConfig

    @property
    def reads_bounds(self) -> bool:
        return self.config.sink_pages + self.config.recent_pages < self.config.num_pages

    def share_read(self, length: int, layer: int, head_dim: int, dtype: torch.dtype) -> float:
        """What one step reads of a layer at ``length`` tokens, bounds included, as a part of all keys and values.

        Each KV head reads ``config.num_pages`` pages of its own, and the bounds of all.
        """
        config = self.config
        if layer < config.dense_layers:
            return 1.0
        pages = math.ceil(length / config.page_size)
        read = min(pages, config.num_pages)
        # The last page is always among them, and only the tokens it has are read.
        tokens: float = length - (pages - read) * config.page_size
        if self.reads_bounds:
            bounds = pages * bytes_of_bounds(head_dim, config.bounds, dtype)
            tokens += bounds / (2 * head_dim * dtype.itemsize)
        return tokens / length


def dense(num_layers: int, page_size: int) -> Policy:
    return Policy("dense", None, QuestConfig(page_size=page_size, dense_layers=num_layers))


def quest(budget: int, page_size: int) -> Policy:
    config = QuestConfig(budget=budget, page_size=page_size, dense_layers=DENSE_LAYERS, group_reduce="max")
    return Policy("Quest", budget, config)


def recent_window(budget: int, page_size: int) -> Policy:
    config = QuestConfig(
        budget=budget,
        page_size=page_size,
        sink_pages=1,
        recent_pages=budget // page_size - 1,
        dense_layers=DENSE_LAYERS,
    )
    return Policy("window", budget, config)
