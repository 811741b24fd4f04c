"""The device's tensors of a paged KV cache, and the step that its layers share.

All tensors are written in place and never replaced, so their addresses stay: a CUDA graph or a compiled function may be
replayed while the cache grows. Nothing here reads a length on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import BoundsKind, kind_of, new_bounds
from .codes import new_codes
from .config import QuestConfig
from .kept_pages import KeptPages
from .ops import GroupReduce, append_codes, append_kv, check_whole, decode_step, new_counters, update_bounds
from .report import AttentionCounts

# The selection of a dense layer: a num_pages of 0 reads every page.
_EVERY_PAGE: tuple[int, GroupReduce, int, int] = (0, "max", 0, 0)


class LayerCache(NamedTuple):
    """A layer of a cache: k_cache, v_cache [N, Hkv, S, D], k_bounds [N, Hkv, 2, D], k_scales [N, Hkv] or None."""

    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor
    k_scales: Tensor | None


class KVState:
    """Keys, values and page bounds of all layers, with one page table and one length a sequence.

    Args:
        k_cache, v_cache: [L, N, Hkv, S, D].
        k_bounds: [L, N, Hkv, 2, D], or [L, N, Hkv, 2, D / 2] of 4 bits.
        page_table: [B, P] int32, logical to physical page; B may be symbolic.
        seq_lens: [B] int32, tokens of each sequence.
        k_scales: [L, N, Hkv] float32, for k_bounds of 8 or 4 bits.
        std_factor: of the bounds, as in :func:`quest_ops.append_kv`.
        counters: of :func:`quest_ops.ops.new_counters`, if all steps of this state run on one stream.
        k_codes, code_scales: [L, N, Hkv, S, D / 4] uint8 and [L, N, Hkv, S] float32, codes of the keys, as in
            :func:`quest_ops.ops.append_codes`; None without a second selection.
        kept: lists that sequences keep for some steps; None where each step selects.
    """

    def __init__(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        k_bounds: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        k_scales: Tensor | None = None,
        std_factor: float | None = None,
        counters: Tensor | None = None,
        k_codes: Tensor | None = None,
        code_scales: Tensor | None = None,
        kept: KeptPages | None = None,
    ) -> None:
        self.kept = kept
        self.std_factor, self.counters = std_factor, counters
        self.k_codes, self.code_scales = k_codes, code_scales
        self.k_cache, self.v_cache, self.k_bounds, self.k_scales = k_cache, v_cache, k_bounds, k_scales
        self.page_table, self.seq_lens = page_table, seq_lens

    @classmethod
    def allocate(
        cls,
        pool: tuple[int, int, int, int, int],
        page_table: Tensor,
        seq_lens: Tensor,
        *,
        dtype: torch.dtype,
        bounds: BoundsKind,
        std_factor: float | None,
        codes: bool = False,
        kept_pages: int = 0,
        zeroed: bool = False,
    ) -> KVState:
        """New pools on the device of ``page_table``.

        Args:
            pool: (L, N, Hkv, S, D).
            page_table, seq_lens: as in the constructor.
            dtype: of keys and values.
            bounds: kind of the page bounds.
            std_factor: as in the constructor.
            codes: allocate k_codes and code_scales.
            kept_pages: pages of a list in ``kept``; 0: None.
            zeroed: fill keys and values with zeros, for a holder that reads tokens before they are written.
        """
        device, (*leading, _, head_dim) = page_table.device, pool
        k_cache = (torch.zeros if zeroed else torch.empty)(pool, dtype=dtype, device=device)
        v_cache = (torch.zeros_like if zeroed else torch.empty_like)(k_cache)
        k_bounds, k_scales = new_bounds(tuple(leading), head_dim, bounds, dtype, device)
        counters = new_counters(page_table.shape[0], pool[2], device)
        state = cls(k_cache, v_cache, k_bounds, page_table, seq_lens, k_scales, std_factor, counters)
        if kept_pages:
            state.kept = KeptPages.allocate(pool[0], page_table.shape[0], pool[2], kept_pages, device)
        if codes:
            state.k_codes, state.code_scales = new_codes(pool[:-1], head_dim, device)
        return state

    @property
    def pools(self) -> list[Tensor]:
        """The tensors [L, N, ...] that hold something of each page."""
        pools = (self.k_cache, self.v_cache, self.k_bounds, self.k_scales, self.k_codes, self.code_scales)
        return [pool for pool in pools if pool is not None]

    def layer(self, index: int) -> LayerCache:
        """The tensors of one layer: views of the pools, [N, ...]."""
        k_scales = None if self.k_scales is None else self.k_scales[index]
        return LayerCache(self.k_cache[index], self.v_cache[index], self.k_bounds[index], k_scales)

    def codes(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """k_codes [N, Hkv, S, D / 4] and code_scales [N, Hkv, S] of one layer, or None."""
        if self.k_codes is None or self.code_scales is None:
            return None
        return self.k_codes[layer], self.code_scales[layer]

    def _append_codes(self, layer: int, k: Tensor, start_lens: Tensor, new_lens: Tensor | None = None) -> None:
        if (codes := self.codes(layer)) is not None:
            append_codes(k, *codes, self.page_table, start_lens, new_lens)

    def append(self, layer: int, k: Tensor, v: Tensor, start_lens: Tensor, new_lens: Tensor | None = None) -> None:
        """Write new tokens of one layer after ``start_lens`` tokens: :func:`quest_ops.append_kv`."""
        k_cache, v_cache, k_bounds, k_scales = self.layer(layer)
        caches = (k_cache, v_cache, k_bounds, self.page_table)
        append_kv(k, v, *caches, start_lens, new_lens, k_scales, self.std_factor)
        self._append_codes(layer, k, start_lens, new_lens)

    def decode_step(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start_lens: Tensor,
        seq_lens: Tensor,
        config: QuestConfig | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The step of one layer: :func:`quest_ops.decode_step`.

        Args:
            layer: its index.
            q, k, v, start_lens, seq_lens, scale: as in the operator.
            config: of the selection in this layer, whose ``reselect_every`` needs ``kept``. None reads every page.

        Returns:
            out and lse of the operator, and the pages read; None: all.
        """
        every, dense_below = (1, 0) if config is None else (config.reselect_every, config.dense_below)
        kept = self.kept if every > 1 and q.shape[1] == 1 else None
        k_cache, v_cache, k_bounds, k_scales = self.layer(layer)
        out, lse, pages = decode_step(
            q,
            k,
            v,
            k_cache,
            v_cache,
            k_bounds,
            self.page_table,
            start_lens,
            seq_lens,
            *(_EVERY_PAGE if config is None else config.selection),
            scale,
            k_scales,
            std_factor=self.std_factor,
            counters=self.counters,
            kept_pages=None if kept is None else kept.lists[layer],
            kept_steps=None if kept is None else kept.steps,
            reselect_every=every,
            dense_below=dense_below,
        )
        self._append_codes(layer, k, start_lens)
        if config is None:
            return out, lse, None
        return out, lse, pages if kept is None else kept.lists[layer][:, None, :, : config.most_pages]

    def selects(self, config: QuestConfig | None, num_new: int) -> Tensor | None:
        """Bool [B], the sequences that read bounds in a step of ``num_new`` tokens; None: all."""
        if self.kept is None or config is None or config.reselect_every == 1 or num_new > 1:
            return None
        return self.kept.selects(config.reselect_every)

    def update_bounds(self, layer: int, first_token: Tensor, seq_lens: Tensor) -> None:
        """Recompute one layer's bounds from the page of ``first_token`` [B] on: :func:`quest_ops.update_bounds`."""
        k_cache, _, k_bounds, k_scales = self.layer(layer)
        paging = (self.page_table, seq_lens)
        update_bounds(k_cache, k_bounds, *paging, first_token, k_scales, self.std_factor)

    # Pages, as the host assigns them

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy physical pages, given as (source, destination), in all layers."""
        source, destination = self._to_device(pairs).T
        for pool in self.pools:
            pool.index_copy_(1, destination, pool.index_select(1, source))

    def with_pages(self, entries: list[tuple[int, int, int]]) -> Tensor:
        """The page table with other entries, given as (sequence, logical page, physical page). A new tensor."""
        columns = self.page_table.shape[1]
        places = [(sequence * columns + logical, physical) for sequence, logical, physical in entries]
        place, value = self._to_device(places).T
        return self.page_table.flatten().index_copy(0, place, value.int()).view_as(self.page_table)

    def bounds_of_page(
        self, logical: int, owners: list[tuple[int, int]], seq_lens: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """The bounds of one logical page of some sequences, in all layers, computed from its keys.

        Args:
            logical: number of the page.
            owners: (sequence, physical page) for each.
            seq_lens: [B] int32, the tokens to count.

        Returns:
            Pairs for :func:`write_together`.
        """
        L, start = self.k_cache.shape[0], logical * self.k_cache.shape[3]
        sequence, page = self._to_device(owners).T
        pools = [self.k_bounds] if self.k_scales is None else [self.k_bounds, self.k_scales]
        # A single launch: each page of each layer goes in as a sequence of its own.
        keys, *bounds = (pool.index_select(1, page).flatten(0, 1) for pool in (self.k_cache, *pools))
        tokens = (seq_lens[sequence] - start).clamp_(min=0).repeat(L)
        table = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)[:, None]
        scales = bounds[1] if len(bounds) > 1 else None
        update_bounds(keys, bounds[0], table, tokens, k_scales=scales, std_factor=self.std_factor)
        return [
            (pool[:, physical], new.unflatten(0, (L, -1))[:, i])
            for pool, new in zip(pools, bounds, strict=True)
            for i, (_, physical) in enumerate(owners)
        ]

    def poison(self, pages: list[int]) -> None:
        """Fill physical pages with NaN in all layers. Bytes of bounds with scales stay, since these become NaN."""
        index = self._to_device([(page,) for page in pages]).flatten()
        for pool in self.pools:
            if pool.is_floating_point():
                pool.index_fill_(1, index, torch.nan)

    def _to_device(self, numbers: Sequence[tuple[int, ...]]) -> Tensor:
        # Made on the host and sent without waiting: torch.tensor(device="cuda") would synchronise.
        return torch.tensor(numbers, dtype=torch.int64).to(self.page_table.device, non_blocking=True)


def write_together(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write tensors in a single operation, so that a failure or an interrupt comes before all writes or after all.

    Args:
        writes: (tensor, new values) pairs. No pair may write what another reads.
    """
    if writes:
        torch._foreach_copy_([tensor for tensor, _ in writes], [values for _, values in writes])


class StepCache:
    """A KVState with the current step of its sequences; all layers take the same steps.

    Base of :class:`quest_ops.PagedKVCache`, whose host knows pages and lengths, and of :class:`quest_ops.CacheView`,
    whose host knows neither.

    Args:
        state: the tensors.
        max_tokens: the longest that a sequence may become.

    Attributes:
        state: the tensors.
        start_lens: [B] int32, tokens before the current step.
        new_lens: [B] int32, the current step's tokens.
        ragged: whether the current step was given a length for each sequence.
        starts_empty: whether the host knows that every sequence was empty before the current step.
        counts: counters of the attention calls, from ``start_report`` on; else None.
    """

    counts: AttentionCounts | None = None

    def __init__(self, state: KVState, max_tokens: int) -> None:
        self.state, self.max_tokens = state, max_tokens
        self.num_layers, self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = state.k_cache.shape
        self.batch_size, self.pages_per_sequence = state.page_table.shape
        self.bounds: BoundsKind = kind_of(state.k_bounds)
        self.device = state.k_cache.device
        self.start_lens, self.new_lens = state.seq_lens.clone(), torch.zeros_like(state.seq_lens)
        self.ragged = self.starts_empty = False

    @property
    def k_cache(self) -> Tensor:
        return self.state.k_cache

    @property
    def v_cache(self) -> Tensor:
        return self.state.v_cache

    @property
    def k_bounds(self) -> Tensor:
        return self.state.k_bounds

    @property
    def k_scales(self) -> Tensor | None:
        return self.state.k_scales

    @property
    def k_codes(self) -> Tensor | None:
        return self.state.k_codes

    @property
    def code_scales(self) -> Tensor | None:
        return self.state.code_scales

    @property
    def kept_pages(self) -> int:
        """Pages of the lists that sequences keep for some steps; 0 without such lists."""
        return 0 if self.state.kept is None else self.state.kept.lists[0].shape[2]

    @property
    def std_factor(self) -> float | None:
        return self.state.std_factor

    @property
    def page_table(self) -> Tensor:
        return self.state.page_table

    @property
    def seq_lens(self) -> Tensor:
        return self.state.seq_lens

    @property
    def pools(self) -> list[Tensor]:
        """The tensors [L, N, ...] that hold something of each page."""
        return self.state.pools

    @property
    def pages_in_use(self) -> int:
        """Logical pages that hold all tokens of the longest sequence; without a host's account, all there may be."""
        return self.pages_per_sequence

    def layer(self, index: int) -> LayerCache:
        """The tensors of one layer: views of the pools, [N, ...]."""
        self._check_layer(index)
        return self.state.layer(index)

    def advance(self, num_new: int, new_lens: Tensor | Sequence[int] | None = None) -> None:
        """Begin a step of ``num_new`` tokens in each sequence, or of ``new_lens`` [B] int32, clamped to 0..num_new."""
        if new_lens is not None and not isinstance(new_lens, Tensor):
            raise TypeError(f"new_lens must be an int32 tensor in a compiled step, got {type(new_lens).__name__}")
        self.ragged = new_lens is not None
        self.start_lens.copy_(self.seq_lens)
        if new_lens is None:
            self.new_lens.fill_(num_new)
        else:
            self.new_lens.copy_(new_lens.clamp(0, num_new), non_blocking=True)
        self.seq_lens.add_(self.new_lens)
        for steps, values in self._kept_steps(self.seq_lens if num_new == 1 and new_lens is None else None):
            steps.copy_(values)

    def _kept_steps(self, seq_lens: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The write of the steps of the kept lists: as :meth:`KeptPages.after`."""
        kept = self.state.kept
        return [] if kept is None else [(kept.steps, kept.after(seq_lens, self.page_size))]

    def _host_is_blind(self) -> bool:
        """Whether this call is traced or captured, so that the host will not see it again when it runs."""
        if torch.compiler.is_compiling():
            return True
        return self.k_cache.is_cuda and torch.cuda.is_current_stream_capturing()

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the step's keys and values of one layer, [B, T, Hkv, D], and renew the bounds of the pages touched.

        Raises:
            RuntimeError: as :meth:`claim_step` and :func:`quest_ops.append_kv`.
            ValueError: no such layer.
        """
        self.claim_step(layer, k)
        self.state.append(layer, k, v, self.start_lens, self.new_lens if self.ragged else None)
        self.step_written(layer)

    def claim_step(self, layer: int, k: Tensor) -> None:  # noqa: ARG002 - the host's account checks its T
        """Check that a layer may write its keys ``k`` of the step. ``append`` does so, and calls ``step_written``.

        Raises:
            ValueError: no such layer.
        """
        self._check_layer(layer)

    def step_written(self, layer: int) -> None:
        """Note that a layer has written its keys and values of the step."""

    def start_report(self) -> None:
        """Count from now on the pages that each layer reads. Call it before compiling or capturing.

        See :mod:`quest_ops.report`.
        """
        heads = (self.num_layers, self.num_kv_heads, self.head_dim, self.page_size)
        with torch.inference_mode(False):  # normal tensors, since later steps may run outside inference mode
            self.counts = AttentionCounts(*heads, self.k_cache.dtype, self.device, self.bounds)

    def stop_report(self) -> None:
        """Count no more."""
        self.counts = None

    def _check_layer(self, index: int) -> None:
        check_whole("layer", index)
        if not 0 <= index < self.num_layers:
            raise ValueError(f"layer must be 0 to {self.num_layers - 1}, got {index}")
