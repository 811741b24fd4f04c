"""All of the cache, by the kernel that also reads Quest's pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quest_ops import sparse_decode

from .base import LayerKV, LayerReader, Policy

if TYPE_CHECKING:
    from torch import Tensor


class DenseReader(LayerReader):
    def __init__(self, kv: LayerKV, page_size: int) -> None:
        super().__init__(kv)
        self._view = kv.pages(page_size)

    def attend(self, q: Tensor) -> Tensor:
        out, _ = sparse_decode(q, *self._view, self.kv.length.seq_lens, None, self.kv.scale)
        return out


@dataclass(frozen=True)
class Dense(Policy):
    has_budget: ClassVar[bool] = False

    def label(self) -> str:
        return "dense"

    def start(self, kv: LayerKV) -> DenseReader:
        return DenseReader(kv, self.page_size)
