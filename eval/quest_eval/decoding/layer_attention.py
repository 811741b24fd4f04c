"""What a session does in one layer of one step: write the new keys and values, attend, and note what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..transformers.dense import Features, Past, prefill
from .policies.column_sums import add_column_sums
from .policies.recall import attention_mass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .policies import LayerKV, LayerReader, Policy


@dataclass(frozen=True)
class StepInfo:
    """What a layer did in one step, for an observer. Its tensors are the session's own: do not keep or change them."""

    policy: Policy
    #: Tokens in each sequence, the one being decoded included.
    length: int
    #: [B, Hq, D].
    q: Tensor
    kv: LayerKV
    #: Logical pages int32 [B, Hs, K], -1 padded, or tokens int64 [B, Hs, n], Hs = 1 (one list for all heads), Hkv or
    #: Hq; both None where everything was read.
    pages: Tensor | None
    tokens: Tensor | None

    def recall(self) -> Tensor:
        """float32 [B, Hq]: the part of dense attention's weights that falls on what was read. Reads all keys."""
        k = self.kv.k[:, :, : self.length]
        return attention_mass(self.q, k, self.kv.scale, self.pages, self.tokens, self.policy.page_size)


#: Called in each layer and decoding step with the layer's number.
Observer = Callable[[int, StepInfo], None]


class Prefill:
    """The attention of a piece of one context."""

    def __init__(self, layers: Sequence[LayerKV], row: int, start: int) -> None:
        self._layers, self._row, self._start = layers, slice(row, row + 1), start

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kv, row, start = self._layers[module.layer_idx], self._row, self._start
        end = start + q.shape[2]
        past = None
        if start:
            position = torch.arange(start, device=q.device)[None]
            past = Past(kv.k[row, :, :start], kv.v[row, :, :start], position, kv.length.seq_lens[row])
        out = prefill(q, k, v, None, Features(scale), past)
        kv.scale = scale
        kv.k[row, :, start:end] = k
        kv.v[row, :, start:end] = v
        first = kv.context - kv.last_queries.shape[2]
        if end > first:
            begin = max(first, start)
            kv.last_queries[row, :, begin - first : end - first] = q[:, :, begin - start :]
        if kv.column_sums is not None:
            add_column_sums(kv.column_sums[row], q, kv.k[row, :, :end], scale)
        return out


class Decode:
    """The attention of one new token of each sequence."""

    def __init__(self, readers: Sequence[LayerReader], policy: Policy, observer: Observer | None) -> None:
        self._readers, self._policy, self._observer = readers, policy, observer

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:  # noqa: ARG002
        reader = self._readers[module.layer_idx]
        kv, length = reader.kv, reader.kv.length.tokens
        kv.k[:, :, length - 1] = k[:, :, 0]
        kv.v[:, :, length - 1] = v[:, :, 0]
        query = q[:, :, 0]
        out = reader.attend(query)
        if self._observer is not None:
            info = StepInfo(self._policy, length, query, kv, reader.pages, reader.tokens)
            self._observer(module.layer_idx, info)
        return out[:, None]
