"""CacheView: a paged cache made of given tensors, for programs that have nothing but tensors."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from .kept_pages import KeptPages
from .kv_state import KVState, StepCache


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("a CacheView keeps no account of pages and lengths: call this on the cache whose tensors it has")


class CacheView(StepCache):
    """The tensors of a paged cache whose pages are assigned elsewhere: for torch.export, and for serving engines.

    ``advance``, ``append`` and :func:`quest_ops.quest_attention` work as over a PagedKVCache and write to the given
    tensors. The host knows neither pages nor lengths. So the page table must already hold the pages of a step's tokens:
    call ``reserve`` on the PagedKVCache that owns the tensors, and its ``sync_lengths`` afterwards. Methods that need
    the host's account raise RuntimeError.

    Args:
        k_cache, v_cache: [L, N, Hkv, S, D].
        k_bounds: [L, N, Hkv, 2, D], or [L, N, Hkv, 2, D / 2] of 4 bits.
        page_table: [B, P] int32; B may be symbolic.
        seq_lens: [B] int32, tokens in the cache; ``advance`` moves it.
        k_scales: [L, N, Hkv] float32, for k_bounds of 8 or 4 bits.
        std_factor: of the bounds, as in :func:`quest_ops.append_kv`.
        k_codes, code_scales: as in :class:`quest_ops.PagedKVCache`, for ``QuestConfig.candidates``.
        kept: lists and steps as in :class:`quest_ops.KeptPages`, for ``QuestConfig.reselect_every``.

    Compiled code is made for one N where L is more than 1, since a layer's place in the pool depends on it. So another
    N compiles again, and ``torch.export`` refuses a symbolic one.
    """

    def __init__(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        k_bounds: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        k_scales: Tensor | None = None,
        std_factor: float | None = 1.0,
        k_codes: Tensor | None = None,
        code_scales: Tensor | None = None,
        kept: KeptPages | None = None,
    ) -> None:
        capacity = page_table.shape[1] * k_cache.shape[3]
        bounds = (k_scales, std_factor)
        state = KVState(k_cache, v_cache, k_bounds, page_table, seq_lens, *bounds, None, k_codes, code_scales, kept)
        super().__init__(state, capacity)

    lengths = free_pages = property(_refuse)
    sync_lengths = reserve = crop = fork = free = reset = _refuse
