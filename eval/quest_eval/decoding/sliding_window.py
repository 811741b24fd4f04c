"""The decoding of sliding layers, which are the same under every policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..policies import LayerReader, tokens

if TYPE_CHECKING:
    from torch import Tensor


class SlidingWindow(LayerReader):
    """Dense attention to the layer's window."""

    def attend(self, q: Tensor) -> Tensor:
        kv, length = self.kv, self.kv.length.tokens
        assert kv.window is not None
        seen = slice(max(0, length - kv.window), length)
        return tokens.attend(q, kv.k[:, :, seen], kv.v[:, :, seen], kv.scale)[0]
