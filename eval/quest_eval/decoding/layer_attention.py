"""One layer's attention in a prefill and in a decoding step: write keys and values, attend, tell the observer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..library import dense_prefill
from ..policies.column_sums import add_column_sums
from .observers import StepInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..policies import LayerKV, LayerReader, Policy
    from .observers import Observer


class PrefillAttention:
    """Dense attention of a chunk of one context, with the notes that policies choose by."""

    def __init__(self, layers: Sequence[LayerKV], row: int, start: int) -> None:
        self._layers, self._row, self._start = layers, slice(row, row + 1), start
        self._before = torch.full_like(layers[0].length.seq_lens[:1], start)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        kv, row, start = self._layers[module.layer_idx], self._row, self._start
        end = start + q.shape[2]
        # The length of what was read before, which the windows of sliding layers are counted from.
        past = (kv.k[row, :, :start], kv.v[row, :, :start], self._before) if start else None
        out = dense_prefill(q, k, v, scale, window, past)
        kv.scale, kv.window = scale, window
        kv.k[row, :, start:end] = k
        kv.v[row, :, start:end] = v
        first = kv.context - kv.last_queries.shape[2]
        if end > first:
            begin = max(first, start)
            kv.last_queries[row, :, begin - first : end - first] = q[:, :, begin - start :]
        if kv.column_sums is not None:  # of full-attention layers alone
            add_column_sums(kv.column_sums[row], q, kv.k[row, :, :end], scale)
        return out


class DecodeAttention:
    """A policy's attention of one new token of each sequence."""

    def __init__(self, readers: Sequence[LayerReader], policy: Policy, observer: Observer | None) -> None:
        self._readers, self._policy, self._observer = readers, policy, observer

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
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
