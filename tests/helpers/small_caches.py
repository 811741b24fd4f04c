"""Small caches whose pages hold NaN until they are written."""

from __future__ import annotations

import pytest
import torch
from quest_ops import PagedKVCache

from helpers.cache_model import History, poison

S = 8
BOUNDS = pytest.mark.parametrize("bounds", ["cache", "int8", "int4"])


def make(device: str, **changes: object) -> PagedKVCache:
    arguments: dict[str, object] = {"max_tokens": 64, "batch_size": 3, "page_size": S, "dtype": torch.float32}
    cache = PagedKVCache(2, 2, 64, **(arguments | {"device": device} | changes))  # type: ignore[arg-type]
    for pool in cache.pools:
        poison(pool)
    return cache


def poison_free_pages(history: History) -> None:
    free = sorted(set(range(history.cache.num_pages)) - set(history.owners()))
    for pool in history.cache.pools:
        poison(pool, free)
