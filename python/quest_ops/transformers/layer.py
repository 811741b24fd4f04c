"""The base of a QuestCache's layers: lengths, checks, and the way from ``update()`` to the attention.

transformers calls a cache's ``update()`` with a layer's new keys and values. The attention function gets nothing of the
cache but the result of that call. So ``update()`` returns the new keys and values alone, with the layer attached to the
keys. The attention function hands them back to the layer, which writes and reads in one go. It also has the mask, which
tells the layer the padding, so padding is never stored.

Only a layer's own attention reads its storage, so each kind of layer has its own layout. On the device each row has its
own length. The host counts columns, padding included, as transformers does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from ..attention import Decision
from ..config import QuestConfig
from ..dense import Features
from ..ops import DTYPES
from ..report import AttentionCounts, LayerPlan

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Settings:
    """Settings that the layers of a cache share and that its owner may change between steps."""

    config: QuestConfig
    codes: bool = False  # whether the layers keep the codes of keys
    kept_pages: int = 0  # pages of the lists that rows keep for some steps
    observer: Callable[[int, Tensor | None, int], None] | None = None
    num_layers: int = 0
    counting: bool = False  # requested; counting begins once heads and device are known
    counts: AttentionCounts | None = None

    def begin_counting(self, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        if self.counting and self.counts is None:
            self.counts = AttentionCounts(
                self.num_layers, heads, head_dim, self.config.page_size, dtype, device, self.config.bounds
            )


class QuestCacheLayer(StaticLayer):  # type: ignore[misc]
    """A layer of a QuestCache. Subclasses store and attend.

    Attributes:
        keys, values: the storage.
        seq_lens: int32 [B], on the device: tokens of each row, without padding.
        next_lens: int32 [B], on the device: ``seq_lens + 1``. Kept, so that not every layer of a step adds.
        cumulative_length: int64 [], on the device: columns, padding included.
        moves_lengths: whether a step of this layer moves both. Layers that share them leave it to the last one.
    """

    is_compileable = True
    is_croppable = True

    def __init__(self, index: int, max_tokens: int, settings: Settings) -> None:
        super().__init__(max_cache_len=max_tokens)
        self.index, self.settings, self.moves_lengths = index, settings, True
        self._columns = 0  # by the host's count
        self._unseen = 0  # columns announced since that count; compiled steps add no more than these
        self._stale = False  # a compiled step moved the lengths unseen by the host
        self._updates = 0  # of eager steps; marks the keys of a step
        self._expected = False  # update() returned keys that have not reached the attention yet
        self._calls = 0  # calls of the attention since the last update()
        self._next: QuestCacheLayer | None = None  # stores the next call of a model that calls the attention again

    @property
    def config(self) -> QuestConfig:
        """The configuration of this layer."""
        return self.settings.config.at(self.index)

    # Implemented by subclasses

    def allocate(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Make the storage. Returns the buffers whose addresses stay."""
        raise NotImplementedError

    def attend_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, visible: Tensor | None
    ) -> Tensor:
        """The part of :meth:`attend` before the lengths move: new tokens go behind ``seq_lens`` ones."""
        raise NotImplementedError

    def twin(self) -> QuestCacheLayer:
        """An empty layer of the same kind."""
        raise NotImplementedError

    def reorder_rows(self, rows: Tensor) -> None:
        """Let row b of the storage be row ``rows[b]`` of before, in place."""
        raise NotImplementedError

    def decide(self, num_new: int = 1) -> Decision:
        """How a step of ``num_new`` tokens runs: :func:`quest_ops.attention.decide`."""
        raise NotImplementedError

    def plan(self) -> LayerPlan:
        """How this layer decodes, and why."""
        raise NotImplementedError

    def forget_cropped(self, lens: Tensor) -> None:
        """Repair the storage after a crop to ``lens`` [B] tokens."""

    # Called by the attention function

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, visible: Tensor | None = None
    ) -> Tensor:
        """Store the step's keys and values, attend, and move the lengths.

        Args:
            q: [B, Hq, T, D].
            k, v: [B, Hkv, T, D].
            real: int32 [B], the number of each row's real tokens, its last ones; None: all.
            features: of the layer.
            visible: bool [B or 1, 1, T, T], the new tokens that each one sees; None: causal. Such a step is dense.

        Returns:
            [B, T, Hq, D].
        """
        out = self.attend_and_store(q, k, v, real, features, visible)
        self._advance(q.shape[2], real)
        return out

    # Called by transformers

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="allocate the QuestCache first: QuestCache(..., batch_size=, dtype=, device=)"
    )
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.dtype not in DTYPES:
            raise ValueError(f"keys must be float32, float16 or bfloat16, got {key_states.dtype}")
        batch, heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise ValueError(f"keys and values must share a head_dim, got {head_dim} and {value_states.shape[-1]}")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim = batch, heads, head_dim, head_dim
        # Normal tensors even if the first step runs under inference_mode, since a later step may not.
        with torch.inference_mode(False):
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
            self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.next_lens = torch.ones_like(self.seq_lens)
            buffers = self.allocate(batch, heads, head_dim, self.dtype, self.device)
        # The mask function checks a mask against the lengths, and gets nothing of the cache but this number.
        self.cumulative_length._quest_lengths = self.seq_lens  # type: ignore[attr-defined]
        for buffer in (*buffers, self.cumulative_length, self.seq_lens, self.next_lens):
            torch._dynamo.mark_static_address(buffer)
        self.settings.begin_counting(heads, head_dim, self.dtype, self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values [B, Hkv, T, D], with this layer attached to the keys."""
        key_states, value_states = self._under_autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._expected:
            raise RuntimeError(
                f"the keys of layer {self.index} never reached the attention 'quest', which alone can read a "
                "QuestCache: call model.set_attn_implementation('quest'), then cache.reset()"
            )
        self._check(key_states, value_states)
        self._expected, self._calls = True, 0
        keys = key_states.view_as(key_states)
        keys._quest_layer = self  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():
            self._updates += 1
            keys._quest_update = self._updates  # type: ignore[attr-defined]
        return keys, value_states

    def _under_autocast(self, *states: Tensor) -> tuple[Tensor, ...]:
        """The states in the cache's dtype, or before it has one in that of autocast. Elsewhere as they are.

        Autocast leaves keys float32 after their rotation while values are 16-bit. Dense attention casts them likewise.
        """
        device = states[0].device.type
        if not torch.is_autocast_enabled(device):
            return states
        dtype = self.dtype if self.is_initialized else torch.get_autocast_dtype(device)
        return tuple(x.to(dtype) for x in states)

    def serving(self, q: Tensor, keys: Tensor, values: Tensor) -> QuestCacheLayer:
        """The layer that stores this call of the attention function: this one for the first call after ``update``.

        DiffLlama calls the attention twice with the keys of one update, and with other values each time. The second
        call has a layer of its own, of the same size, so neither call stores anything twice.

        Args:
            q: [B, Hq, T, D].
            keys: [B, Hkv, T, D], as ``update`` returned them.
            values: [B, Hkv, T, D].

        Raises:
            RuntimeError: keys of an earlier step, or a call that earlier steps lacked.
            ValueError: keys of another shape than the values, or for other tokens than the queries.
        """
        if not torch.compiler.is_compiling() and getattr(keys, "_quest_update", self._updates) != self._updates:
            raise RuntimeError(
                f"attention 'quest' got keys that layer {self.index} returned in an earlier step: a QuestCache stores "
                "the keys of each step once"
            )
        self._expected = False
        if values.shape != keys.shape or q.shape[2] != keys.shape[2]:
            raise ValueError(
                f"layer {self.index} needs a key and a value of the same head_dim for each query, got queries "
                f"{list(q.shape)}, keys {list(keys.shape)} and values {list(values.shape)}"
            )
        layer = self
        for _ in range(self._calls):
            layer = layer._next_call(keys, values)
        self._calls += 1
        return layer

    def _next_call(self, keys: Tensor, values: Tensor) -> QuestCacheLayer:
        """The layer of the call after this layer's, which this step has already advanced."""
        if self._next is None:
            self._next = self.twin()
        if not self._next.is_initialized:
            self._next.lazy_initialization(keys, values)
        if not torch.compiler.is_compiling() and self._next.columns + keys.shape[2] != self.columns:
            raise RuntimeError(
                f"layer {self.index} called the attention more often in this step than in earlier ones of this "
                "QuestCache, which so lacks values that the call needs: call cache.reset()"
            )
        return self._next

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # The number of keys that update() returns. No other call comes before each step, compiled or not.
        if self.is_initialized and not torch.compiler.is_compiling():
            self._reserve(query_length)
            self._unseen += query_length
        return query_length, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of each row. The number is negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or 0, got {tokens_to_remove}")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        columns = self.columns
        if -tokens_to_remove > columns:
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens from a cache of {columns}")
        self._columns += tokens_to_remove
        lens = (self.seq_lens + tokens_to_remove).clamp_(min=0)
        self.forget_cropped(lens)
        if self.moves_lengths:
            self.cumulative_length.add_(tokens_to_remove)
            self._set_lens(lens)
        if self._next is not None:
            self._next.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b be row ``beam_idx[b]`` of before, in place."""
        if self.is_initialized:
            rows = beam_idx.to(self.device)
            self.reorder_rows(rows)
            if self.moves_lengths:
                self._set_lens(self.seq_lens.index_select(0, rows))
        if self._next is not None:
            self._next.reorder_cache(beam_idx)

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        self._columns = self._unseen = 0
        self._stale = self._expected = False
        self._calls = 0
        if self.is_initialized:
            self.cumulative_length.zero_()
            self._set_lens(torch.zeros_like(self.seq_lens))
        if self._next is not None:
            self._next.reset()

    # Lengths

    @property
    def has_counted(self) -> bool:
        """Whether ``columns`` needs no look at the device."""
        return self.is_initialized and not self._stale

    @property
    def columns(self) -> int:
        """Columns in the cache, padding included. Synchronises if compiled steps have run since the last call."""
        if self._stale:
            self._columns, self._unseen, self._stale = int(self.cumulative_length), 0, False
        return self._columns

    @property
    def known_empty(self) -> bool:
        """Whether the host knows that the cache is empty; in compiled code it never knows."""
        return not torch.compiler.is_compiling() and self.columns == 0

    def share(self, last: QuestCacheLayer) -> None:
        """Take what layers have in common from ``last``, the last one of a step, which moves the lengths for all."""
        self.seq_lens, self.next_lens, self.cumulative_length = last.seq_lens, last.next_lens, last.cumulative_length
        self.moves_lengths = self is last

    def lens_after(self, tokens: int, real: Tensor | None) -> Tensor:
        """int32 [B]: ``seq_lens`` after a step of ``tokens`` columns, of which ``real`` [B] are no padding."""
        return self.seq_lens + (tokens if real is None else real)

    def _advance(self, tokens: int, real: Tensor | None) -> None:
        """Move the lengths past a step."""
        if torch.compiler.is_compiling():
            self._stale = True
        else:
            self._columns, self._unseen = self.columns + tokens, 0
        if self.moves_lengths:
            self.cumulative_length.add_(tokens)
            self._set_lens(self.lens_after(tokens, real))

    def _set_lens(self, lens: Tensor) -> None:
        self.seq_lens.copy_(lens)
        self.next_lens.copy_(lens + 1)

    def _reserve(self, tokens: int) -> None:
        """Raise if a step of ``tokens`` does not fit."""
        if self._stale and self._columns + self._unseen + tokens <= self.max_cache_len:
            return
        taken = self.columns
        if taken + tokens > self.max_cache_len:
            raise ValueError(
                f"this QuestCache holds {self.max_cache_len} tokens, {taken} of them taken, and was given {tokens} "
                "more: make max_tokens larger"
            )

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, tokens, head_dim = key_states.shape
        if batch != self.batch_size:
            raise ValueError(f"this QuestCache was made for a batch of {self.batch_size}, got {batch} sequences")
        if heads != self.num_heads or head_dim != self.k_head_dim or value_states.shape != key_states.shape:
            raise ValueError(
                f"layer {self.index} of this QuestCache has {self.num_heads} KV heads of {self.k_head_dim}, got keys "
                f"{list(key_states.shape)} and values {list(value_states.shape)}"
            )
        for states in (key_states, value_states):
            if states.dtype != self.dtype or states.device != self.device:
                raise ValueError(
                    f"layer {self.index} of this QuestCache holds {self.dtype} on {self.device}, got {states.dtype} on "
                    f"{states.device}"
                )
        if not torch.compiler.is_compiling():
            self._reserve(tokens)
