"""A layer of sliding-window attention: it stores the window only and reads it densely."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Decision, decide
from ..dense import Features, Past, attend_by_position, last_positions, prefill
from ..ops import MAX_NEW_TOKENS
from ..report import LayerPlan
from .layer import QuestCacheLayer, Settings

#: Tokens stored besides the window, which bounds the tokens that can be cropped.
SLACK = 128


class SlidingLayer(QuestCacheLayer):
    """Keys and values [B, Hkv, C + 1, D]: a ring of the last C tokens of each row, and a slot for padding.

    Token p of a row lies at p modulo C. C is larger than the window. So the tokens that a few new ones overwrite are
    outside the window, even after the new ones are cropped.
    """

    is_sliding = True

    def __init__(self, index: int, max_tokens: int, settings: Settings, window: int) -> None:
        super().__init__(index, max_tokens, settings)
        self.window = window
        self.ring = min(max_tokens, window + SLACK)

    def allocate(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        self.keys = torch.zeros(batch, heads, self.ring + 1, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        return [self.keys, self.values]

    def decide(self, num_new: int = 1) -> Decision:
        return decide(self.settings.config, self.index, 0, num_new, lacks_feature=True)

    def plan(self) -> LayerPlan:
        return LayerPlan(self.index, self.decide().path, f"sliding window of {self.window} tokens")

    def twin(self) -> SlidingLayer:
        return SlidingLayer(self.index, self.max_cache_len, self.settings, self.window)

    def attend_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, visible: Tensor | None
    ) -> Tensor:
        if features.window is None:
            # Moshi, for one, attends to the whole prompt, and later to what the cache has left of it.
            raise ValueError(
                f"the configuration gives layer {self.index} a sliding window of {self.window} tokens, and its "
                "attention has none"
            )
        features, counts = features._replace(window=self.window), self.settings.counts
        is_prefill = visible is not None or self.decide(q.shape[2]).path == "prefill"
        if counts is not None:
            count = counts.record_prefill if is_prefill else counts.record_step
            count(self.index)
        if is_prefill:
            past = None if self.known_empty else self._past(self.seq_lens)
            out = prefill(q, k, v, real, features, past, visible)
            self._append(k, v, real)
            return out
        self._append(k, v, real)
        lens = self.lens_after(q.shape[2], real)
        return attend_by_position(q, self._past(lens), last_positions(lens, q.shape[2]), features)

    def reorder_rows(self, rows: Tensor) -> None:
        for buffer in (self.keys, self.values):
            buffer.copy_(buffer.index_select(0, rows))

    def crop(self, tokens_to_remove: int) -> None:
        columns = self.columns if self.is_initialized else 0
        # The removed tokens, and the next few, have overwritten older ones in the ring.
        most = self.ring - self.window - MAX_NEW_TOKENS
        if columns > self.ring and -tokens_to_remove > most:
            raise ValueError(
                f"a QuestCache with sliding layers can crop {most} tokens at most, got {-tokens_to_remove}"
            )
        super().crop(tokens_to_remove)

    def _past(self, lens: Tensor) -> Past:
        """The tokens of the ring where each row has ``lens`` [B]."""
        ring = slice(0, self.ring)
        return Past(self.keys[:, :, ring], self.values[:, :, ring], self._position(lens), lens)

    def _position(self, lens: Tensor) -> Tensor:
        """[B, C]: the position of the token in each slot of the ring, -1 where there is none."""
        last = lens[:, None].long() - 1
        place = torch.arange(self.ring, device=lens.device)
        return (last - torch.remainder(last - place, self.ring)).clamp(min=-1)

    def _append(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        tokens = k.shape[2]
        kept = min(tokens, self.ring)
        place = torch.arange(tokens - kept, tokens, device=k.device)
        padding = None if real is None else (tokens - real)[:, None]
        slot = self.seq_lens[:, None] + place - (0 if padding is None else padding)
        slot = torch.remainder(slot.long(), self.ring)
        if padding is not None:
            slot = torch.where(place < padding, self.ring, slot)
        row = torch.arange(self.batch_size, device=k.device)[:, None]
        for store, new in ((self.keys, k), (self.values, v)):
            store.transpose(1, 2).index_put_((row, slot), new[:, :, tokens - kept :].transpose(1, 2).detach())
