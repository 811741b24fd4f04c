"""A layer of full attention: its keys lie in pages with bounds, and Quest reads it sparsely."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import Decision, choose_pages, decide
from ..config import LayerPages, QuestConfig
from ..dense import Features, Past, attend_by_position, last_positions, past_of_pages, prefill
from ..kv_state import KVState
from ..ops import HEAD_DIMS, MAX_NEW_TOKENS, check_choice, sparse_decode
from ..report import LayerPlan
from ._say import say_once
from .layer import QuestCacheLayer, Settings

#: Called in eager mode in each decoding step of each paged layer. Its arguments are the layer's index, the pages read,
#: int32 [B, T, Hs, K] padded with -1, or None where the layer ran dense, and the number of columns in the cache.
Observer = Callable[[int, "Tensor | None", int], None]


class PagedLayer(QuestCacheLayer):
    """A layer whose rows lie in pages, the pages of a row one after the other.

    Attributes:
        state: the tensors, a KVState of a single layer with N = B * P physical pages.
    """

    state: KVState

    def __init__(self, index: int, max_tokens: int, settings: Settings) -> None:
        super().__init__(index, max_tokens, settings)
        self.pages_per_row = max_tokens // settings.config.page_size
        self._lacking: str | None = None  # the model's feature that the operators lack

    def allocate(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        check_choice("the model's head_dim", head_dim, HEAD_DIMS)
        config, pages = self.settings.config, batch * self.pages_per_row
        page_table = torch.arange(pages, dtype=torch.int32, device=device).view(batch, -1)
        pool = (1, pages, heads, config.page_size, head_dim)
        # Zeroed: dense attention gives unwritten tokens a weight of 0, and 0 times NaN is NaN.
        self.state = KVState.allocate(
            pool,
            page_table,
            self.seq_lens,
            dtype=dtype,
            bounds=config.bounds,
            std_factor=config.std_factor,
            codes=self.settings.codes,
            kept_pages=self.settings.kept_pages,
            zeroed=True,
        )
        self.keys, self.values = self.state.layer(0)[:2]  # the storage, where transformers expects it
        assert self.state.counters is not None
        kept = [] if self.state.kept is None else self.state.kept.tensors
        return [*self.state.pools, page_table, self.state.counters, *kept]

    def decide(self, num_new: int = 1) -> Decision:
        return decide(self.settings.config, self.index, self.pages_per_row, num_new, self._lacking is not None)

    def plan(self) -> LayerPlan:
        config, (path, rule) = self.config, self.decide()
        listed = isinstance(self.settings.config.budget, tuple)
        first = f"one of the first {config.dense_layers} layers (dense_layers)"
        reasons = {
            "feature": self._lacking or "",
            "dense layer": "a budget of 0" if listed else first,
            "fits the budget": f"the cache's {self.max_cache_len} tokens fit the budget of {config.budget}",
            "always short": f"the cache's {self.max_cache_len} tokens are within dense_below, {config.dense_below}",
            "over the budget": f"reads at most {config.num_pages * config.page_size} of {self.max_cache_len} tokens",
        }
        return LayerPlan(self.index, path, reasons[rule])

    def twin(self) -> PagedLayer:
        return PagedLayer(self.index, self.max_cache_len, self.settings)

    def attend_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, visible: Tensor | None
    ) -> Tensor:
        if features.window is not None and features.window >= self.max_cache_len:
            features = features._replace(window=None)
        self._note_features(features)
        tokens = q.shape[2]
        path = self.decide(tokens).path
        if path == "prefill" or visible is not None:
            if self.settings.counts is not None:
                self.settings.counts.record_prefill(self.index)
            return self._prefill(q, k, v, real, features, visible)
        if self._lacking is not None:
            self._append(k, v, real)
            return self._decode_densely(q, real, features)
        if (path == "dense" or self.config.in_one_call) and (real is None or tokens == 1):
            return self._decode_step(q, k, v, real, features, self.config if path == "sparse" else None)
        self._append(k, v, real)
        return self._decode(q, real, features, path == "sparse")

    def reorder_rows(self, rows: Tensor) -> None:
        used = self._used_pages(self.columns)
        for pool in self.state.pools:
            pages = pool[0].unflatten(0, (self.batch_size, -1))[:, :used]
            pages.copy_(pages.index_select(0, rows))
        self._select_next()

    def _select_next(self) -> None:
        """Let all rows select pages in the next step."""
        if self.state.kept is not None:
            self.state.kept.steps.fill_(-1)

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self._select_next()

    def share(self, last: QuestCacheLayer) -> None:
        super().share(last)
        self.state.seq_lens = self.seq_lens
        if isinstance(last, PagedLayer) and last.num_heads == self.num_heads:
            self.state.page_table, self.state.counters = last.state.page_table, last.state.counters

    def forget_cropped(self, lens: Tensor) -> None:
        self._select_next()
        # The bounds of a last page still cover its cropped tokens.
        self.state.update_bounds(0, (lens - 1).clamp_(min=0), lens)

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, visible: Tensor | None
    ) -> Tensor:
        past = None
        if not self.known_empty:
            compiling = torch.compiler.is_compiling()
            if not compiling and MAX_NEW_TOKENS < q.shape[2] <= 64:
                say_once(
                    f"a step of {q.shape[2]} tokens ran dense: more than {MAX_NEW_TOKENS} new tokens are a prefill. "
                    f"For assisted decoding set num_assistant_tokens to at most {MAX_NEW_TOKENS - 1}",
                    logging.INFO,
                )
            past = self._past(self.seq_lens)
        out = prefill(q, k, v, real, features, past, visible)
        self._append(k, v, real)
        return out

    def _past(self, lens: Tensor, new: int = 0) -> Past:
        """The first ``lens`` [B] tokens, of which the last ``new`` columns are this step's.

        In compiled code the whole capacity, since the host knows no length there.
        """
        compiling = torch.compiler.is_compiling()
        pages = self.pages_per_row if compiling else self._used_pages(self.columns + new)
        rows = (pool.unflatten(0, (self.batch_size, -1))[:, :pages] for pool in self.state.layer(0)[:2])
        return past_of_pages(rows, lens)

    def _append(self, k: Tensor, v: Tensor, real: Tensor | None) -> None:
        tokens = k.shape[2]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if real is not None and tokens > 1:
            k, v = (_padding_last(x, real) for x in (k, v))
        self.state.append(0, k, v, self.seq_lens, real)
        self._select_next()

    def _decode_step(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, config: QuestConfig | None
    ) -> Tensor:
        """A step in one call. Dense layers have no config."""
        tokens = q.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # A padding token too is written after its row's end. The row's next real token overwrites it.
        written = self.next_lens if tokens == 1 else self.seq_lens + tokens
        kept = self.state.kept if config is not None else None
        if kept is not None:
            kept.steps.copy_(kept.after(written if tokens == 1 else None, self.config.page_size))
        out, lse, selected = self.state.decode_step(0, q, k, v, self.seq_lens, written, config, features.scale)
        self._observe(selected, tokens)
        self._count(selected, tokens, real, self.state.selects(config, tokens))
        return _with_sinks(out, lse, features.sinks)

    def _decode(self, q: Tensor, real: Tensor | None, features: Features, sparse: bool) -> Tensor:
        k_cache, v_cache, k_bounds, k_scales = self.state.layer(0)
        config, queries, selected = self.config, q.transpose(1, 2), None
        paging = (self.state.page_table, self.lens_after(q.shape[2], real))
        if sparse:
            scale = q.shape[-1] ** -0.5 if features.scale is None else features.scale
            view = LayerPages(k_cache, v_cache, k_bounds, k_scales, *paging, scale)
            selected = choose_pages(self.index, queries, view, config, self.state.codes(0))
        self._observe(selected, q.shape[2])
        self._count(selected, q.shape[2], real)
        out, lse = sparse_decode(queries, k_cache, v_cache, *paging, selected, features.scale)
        return _with_sinks(out, lse, features.sinks)

    def _decode_densely(self, q: Tensor, real: Tensor | None, features: Features) -> Tensor:
        tokens, lens = q.shape[2], self.lens_after(q.shape[2], real)
        if not torch.compiler.is_compiling():
            self._observe(None, tokens)
        self._count(None, tokens, real)
        return attend_by_position(q, self._past(lens, tokens), last_positions(lens, tokens), features)

    def _observe(self, selected: Tensor | None, new: int) -> None:
        if self.settings.observer is not None:
            if selected is not None and self.state.kept is not None:
                selected = selected.clone()  # later steps write the kept lists
            self.settings.observer(self.index, selected, self.columns + new)

    def _count(self, selected: Tensor | None, tokens: int, real: Tensor | None, selects: Tensor | None = None) -> None:
        if self.settings.counts is not None:
            how = (self.config.reads_bounds, self.config.candidate_pages, selects)
            self.settings.counts.record(self.index, selected, self.lens_after(tokens, real), tokens, *how)

    def _note_features(self, features: Features) -> None:
        """Note a feature that makes this layer dense under any configuration, and log it once."""
        feature = None
        if features.softcap is not None:
            feature = f"logit soft-capping at {features.softcap:g}"
        elif features.window is not None:
            feature = f"sliding window of {features.window} tokens"
        if feature is not None and self._lacking is None:
            self._lacking = feature
            if not torch.compiler.is_compiling():
                say_once(f"attention 'quest' runs dense, as it does not have it, in layers with {feature}")

    def _used_pages(self, columns: int) -> int:
        return -(-columns // self.settings.config.page_size)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Adds exp(sink) to each softmax's denominator; a sink has no value, so the numerator stays."""
    return out if sinks is None else out * torch.sigmoid(lse - sinks.float())[..., None].to(out.dtype)


def _padding_last(x: Tensor, real: Tensor) -> Tensor:
    """X [B, T, Hkv, D] with each row's real tokens moved from its end to its beginning."""
    tokens = x.shape[1]
    place = torch.arange(tokens, device=x.device) + (tokens - real)[:, None]
    place = place.clamp(max=tokens - 1)[..., None, None]
    return x.gather(1, place.expand(x.shape))
