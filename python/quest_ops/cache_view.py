"""CacheView: a paged cache as a step sees it, tensors alone, for programs that have nothing but tensors."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .cache import PagedKVCache


class CacheView(PagedKVCache):
    """The tensors of a paged cache that someone else keeps the account of: for torch.export, and for serving engines.

    ``advance``, ``append`` and :func:`quest_ops.quest_attention` work as over a PagedKVCache, and write to the given
    tensors. There is no host's account: the pages of a step's tokens must already be in the page table (``reserve`` on
    the PagedKVCache that the tensors come from, whose ``sync_lengths`` then follows), and what needs an account raises.

    Args:
        k_cache, v_cache: [L, N, Hkv, S, D].
        k_bounds: [L, N, Hkv, 2, D].
        page_table: [B, P] int32; B may be symbolic.
        seq_lens: [B] int32, tokens in the cache; ``advance`` moves it.
        k_scales: [L, N, Hkv] float32, where k_bounds is int8.

    Raises:
        ValueError: N is symbolic, which Inductor would compile to a wrong program: every layer writing into the first.
    """

    def __init__(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        k_bounds: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        k_scales: Tensor | None = None,
    ) -> None:
        if isinstance(k_cache.shape[1], torch.SymInt):
            raise ValueError(f"k_cache must have a static number of pages in dimension 1, got {k_cache.shape[1]}")
        self.k_cache, self.v_cache, self.k_bounds, self.k_scales = k_cache, v_cache, k_bounds, k_scales
        self.bounds = "cache" if k_scales is None else "int8"
        self.page_table, self.seq_lens = page_table, seq_lens
        self.start_lens, self.new_lens = seq_lens.clone(), torch.zeros_like(seq_lens)
        self.num_layers, self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = k_cache.shape
        self.batch_size, self.pages_per_sequence = page_table.shape
        self.max_tokens, self.device = self.pages_per_sequence * self.page_size, k_cache.device
        self.ragged = self.starts_empty = self._stale = False

    def _tracing(self) -> bool:
        return True  # as in compiled code, the host knows no lengths

    def _require_known_lengths(self) -> None:
        _ = self._account

    @property
    def _account(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError(
            "a CacheView keeps no account of pages and lengths: call this on the cache whose tensors it has"
        )
