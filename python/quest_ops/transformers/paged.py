"""A layer whose keys are kept in pages with bounds: Quest reads it sparsely."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import select_pages
from ..bounds import new_bounds
from ..dense import Features, Past, attend_by_position, past_of_pages, prefill
from ..ops import HEAD_DIMS, MAX_NEW_TOKENS, append_kv, check_choice, decode_step, sparse_decode, update_bounds
from ._say import say_once
from .layer import QuestCacheLayer, Settings

#: Called in each layer that is kept in pages, in each decoding step run in eager mode, with the layer's number, the
#: pages read (int32 [B, T, Hs, K], -1 padded, or None where it ran dense) and the number of columns in the cache.
Observer = Callable[[int, "Tensor | None", int], None]


class PagedLayer(QuestCacheLayer):
    """Keys and values [B * P, Hkv, S, D], a row's pages one after the other, and the bounds of each page's keys."""

    def __init__(self, index: int, max_tokens: int, settings: Settings) -> None:
        super().__init__(index, max_tokens, settings)
        self.pages_per_row = max_tokens // settings.config.page_size
        self._dense_feature: str | None = None  # what the model asks of this layer that the operators do not have

    def allocate(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        check_choice("the model's head_dim", head_dim, HEAD_DIMS)
        pages = batch * self.pages_per_row
        # Zeros: dense attention multiplies what lies past the last token by a weight of 0, so it must not be NaN.
        self.keys = torch.zeros(pages, heads, self.page_size, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.bounds, self.scales = new_bounds((pages, heads), head_dim, self.settings.config.bounds, dtype, device)
        self.page_table = torch.arange(pages, dtype=torch.int32, device=device).view(batch, -1)
        return [*self._pools(), self.page_table]

    def _pools(self) -> list[Tensor]:
        """All that is held of each page."""
        return [x for x in (self.keys, self.values, self.bounds, self.scales) if x is not None]

    @property
    def page_size(self) -> int:
        return self.settings.config.page_size

    def decision(self) -> tuple[str, str]:
        config = self.settings.config
        if self._dense_feature is not None:
            return "dense", self._dense_feature
        if self.index < config.dense_layers:
            return "dense", f"one of the first {config.dense_layers} layers (dense_layers)"
        if self.pages_per_row <= config.num_pages:
            return "dense", f"the cache's {self.max_cache_len} tokens fit the budget of {config.budget}"
        return "sparse", f"reads at most {config.num_pages * config.page_size} of {self.max_cache_len} tokens"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features) -> Tensor:
        if features.window is not None and features.window >= self.max_cache_len:
            features = features._replace(window=None)
        self._note(features)
        if q.shape[2] > MAX_NEW_TOKENS:
            if self.settings.counts is not None:
                self.settings.counts.record_prefill(self.index)
            return self._prefill(q, k, v, real, features)
        sparse = self.decision()[0] == "sparse"
        if sparse and not self.settings.config.is_window and (real is None or q.shape[2] == 1):
            return self._decode_step(q, k, v, real, features)
        self._append(k, v, real)
        if self._dense_feature is not None:
            return self._decode_densely(q, features)
        return self._decode(q, features, sparse)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b be what row ``beam_idx[b]`` was, in place."""
        if not self.is_initialized:
            return
        rows = beam_idx.to(self.device)
        used = self._used_pages(self.columns)
        for pool in self._pools():
            pages = pool.unflatten(0, (self.batch_size, -1))[:, :used]
            pages.copy_(pages.index_select(0, rows))
        self.seq_lens.copy_(self.seq_lens.index_select(0, rows))

    def _forget_cropped(self) -> None:
        # A last page that has lost tokens must forget them in its bounds too.
        last = (self.seq_lens - 1).clamp_(min=0)
        update_bounds(self.keys, self.bounds, self.page_table, self.seq_lens, last, self.scales)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features) -> Tensor:
        past = None
        if not self.known_empty:
            compiling = torch.compiler.is_compiling()
            if not compiling and q.shape[2] <= 64:
                say_once(
                    f"a step of {q.shape[2]} tokens ran dense: more than {MAX_NEW_TOKENS} new tokens are a prefill. "
                    f"For assisted decoding set num_assistant_tokens to at most {MAX_NEW_TOKENS - 1}",
                    logging.INFO,
                )
            past = self._past(self.pages_per_row if compiling else self._used_pages(self.columns))
        out = prefill(q, k, v, real, features, past)
        self._append(k, v, real)
        return out

    def _past(self, pages: int) -> Past:
        k_pages, v_pages = (x.unflatten(0, (self.batch_size, -1))[:, :pages] for x in (self.keys, self.values))
        return past_of_pages(k_pages, v_pages, self.seq_lens)

    def _append(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        tokens = k.shape[2]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if real is not None and tokens > 1:
            k, v = (_padding_last(x, real) for x in (k, v))
        append_kv(k, v, self.keys, self.values, self.bounds, self.page_table, self.seq_lens, real, self.scales)
        self.advance(tokens, real)

    def _decode_step(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features) -> Tensor:
        config, tokens = self.settings.config, q.shape[2]
        start = self.seq_lens.clone()
        out, lse, selected = decode_step(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.keys,
            self.values,
            self.bounds,
            self.page_table,
            start,
            # A row that has ended gets its padding behind its end, where the next token will take its place.
            start + tokens,
            config.num_pages,
            config.group_reduce,
            config.sink_pages,
            config.recent_pages,
            features.scale,
            self.scales,
        )
        self.advance(tokens, real)
        self._observe(selected)
        self._count(selected, tokens)
        return _with_sinks(out, lse, features.sinks)

    def _decode(self, q: Tensor, features: Features, sparse: bool) -> Tensor:
        config, queries, selected = self.settings.config, q.transpose(1, 2), None
        where = (self.page_table, self.seq_lens)
        if sparse:
            selected = select_pages(queries, self.bounds, *where, config, features.scale, self.scales)
        self._observe(selected)
        self._count(selected, q.shape[2])
        out, lse = sparse_decode(queries, self.keys, self.values, *where, selected, features.scale)
        return _with_sinks(out, lse, features.sinks)

    def _decode_densely(self, q: Tensor, features: Features) -> Tensor:
        compiling, tokens = torch.compiler.is_compiling(), q.shape[2]
        if not compiling:
            self._observe(None)
        self._count(None, tokens)
        past = self._past(self.pages_per_row if compiling else self._used_pages(self.columns))
        return attend_by_position(q, past, self.last_positions(tokens), features)

    def _observe(self, selected: Tensor | None) -> None:
        if self.settings.observer is not None:
            self.settings.observer(self.index, selected, self.columns)

    def _count(self, selected: Tensor | None, tokens: int) -> None:
        if self.settings.counts is not None:
            self.settings.counts.record(self.index, selected, self.seq_lens, tokens)

    def _note(self, features: Features) -> None:
        """Remember, and say once, what makes this layer dense whatever the configuration says."""
        feature = None
        if features.softcap is not None:
            feature = f"logit soft-capping at {features.softcap:g}"
        elif features.window is not None:
            feature = f"sliding window of {features.window} tokens"
        if feature is not None and self._dense_feature is None:
            self._dense_feature = feature
            if not torch.compiler.is_compiling():
                say_once(f"attention 'quest' runs dense, as it does not have it, in layers with {feature}")

    def _used_pages(self, columns: int) -> int:
        return -(-columns // self.page_size)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """A sink adds exp(sink) to the sum under each weight, and nothing to the sum of values."""
    return out if sinks is None else out * torch.sigmoid(lse - sinks.float())[..., None].to(out.dtype)


def _padding_last(x: Tensor, real: Tensor) -> Tensor:
    """[B, T, Hkv, D] with the real tokens of each row, which come last in it, first."""
    tokens = x.shape[1]
    place = torch.arange(tokens, device=x.device) + (tokens - real)[:, None]
    place = place.clamp(max=tokens - 1)[..., None, None]
    return x.gather(1, place.expand(x.shape))
