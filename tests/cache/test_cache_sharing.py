"""Page ownership in PagedKVCache: forks, copies on write, and freed pages."""

from __future__ import annotations

import pytest
import torch
from helpers.cache_model import History, same_snapshot, snapshot
from helpers.small_caches import BOUNDS, S, make, poison_free_pages
from quest_ops import CacheFullError
from quest_ops.page_allocator import NewPage, PageAllocator


@BOUNDS
def test_fork_shares_pages_and_then_diverges(device: str, bounds: str) -> None:
    history = History(make(device, bounds=bounds))
    history.step(20, [20, 0, 11])
    free = history.cache.free_pages
    history.fork(0, 1)
    history.check()
    assert history.cache.free_pages == free
    history.fork(0, 2)  # the old pages are freed
    assert history.cache.free_pages == free + 2
    history.check()
    for T, lens in ((2, [0, 2, 0]), (3, [3, 3, 3]), (9, [9, 1, 0]), (1, None)):
        history.step(T, lens)
        history.check()
    history.free(0)
    history.check()
    poison_free_pages(history)
    history.step(8)
    history.check()


@BOUNDS
def test_copy_on_write_leaves_the_source_bits(device: str, bounds: str) -> None:
    history = History(make(device, bounds=bounds))
    cache = history.cache
    history.step(13)
    history.fork(0, 1)
    pages = cache.page_table[0, :2].tolist()
    before = [pool[:, pages].clone() for pool in cache.pools]
    history.step(5, [0, 5, 0])
    assert cache.page_table[0, :2].tolist() == pages
    assert cache.page_table[1, 0].item() == pages[0]
    assert cache.page_table[1, 1].item() != pages[1]
    for pool, bits in zip(cache.pools, before, strict=True):
        torch.testing.assert_close(pool[:, pages], bits, rtol=0, atol=0, equal_nan=True)
    history.check()


def test_the_source_of_a_fork_copies_on_write_too(device: str) -> None:
    history = History(make(device))
    history.step(13, [13, 0, 0])
    history.fork(0, 1)
    history.step(2, [2, 0, 0])
    history.check()


@BOUNDS
def test_reserve_copies_all_of_a_shared_page(device: str, bounds: str) -> None:
    history = History(make(device, bounds=bounds))
    history.step(13, [13, 0, 0])
    history.fork(0, 1)
    history.cache.reserve(1, 1)
    assert history.cache.page_table[0, 1] != history.cache.page_table[1, 1]
    history.check()


def test_an_unsure_length_copies_every_shared_page_it_may_write() -> None:
    account = PageAllocator(sequences=2, num_pages=8, page_size=S, max_tokens=64)

    def reserve(counts: list[int]) -> list[NewPage]:
        new = account.plan(counts)
        account.take(counts, new)
        return new

    reserve([20, 0])
    account.grow([9, 0], [20, 0])  # 9 to 20 tokens: page 1 or 2 is being written
    account.fork(0, 1)
    assert account.tables[1] == [0, 1, 2]
    assert [(new.logical, new.copy_of) for new in reserve([0, 1])] == [(1, 1), (2, 2)]
    assert reserve([1, 0]) == reserve([0, 1]) == []


def test_the_last_owner_of_a_page_writes_it_in_place(device: str) -> None:
    history = History(make(device, num_pages=6))
    history.step(13, [13, 0, 0])
    history.fork(0, 1)
    history.fork(0, 2)
    assert history.cache.free_pages == 4
    history.step(2)  # two copies of the partial page, not three
    assert history.cache.free_pages == 2
    history.check()
    history.step(1)
    assert history.cache.free_pages == 2
    history.check()


def test_fork_does_not_share_pages_reserved_ahead(device: str) -> None:
    history = History(make(device))
    history.step(5, [5, 0, 0])
    history.cache.reserve(40, 0)
    history.fork(0, 1)
    assert (history.cache.page_table >= 0).sum(1).tolist() == [6, 1, 0]
    history.step(12, [12, 12, 0])
    history.check()


@BOUNDS
def test_crop_of_a_shared_page_leaves_the_bounds_of_the_other(device: str, bounds: str) -> None:
    history = History(make(device, bounds=bounds))
    history.step(14, [14, 0, 0])
    history.fork(0, 1)
    history.crop(10, 1)
    history.check()  # the source's bounds are exact, the fork's may be wider
    assert history.loose == {1}
    history.step(1, [0, 1, 0])
    assert history.loose == set()
    history.check()


@BOUNDS
def test_a_sequence_never_reads_what_a_page_held_before(device: str, bounds: str) -> None:
    history = History(make(device, num_pages=9, bounds=bounds))
    history.step(24)
    history.free(1)
    poison_free_pages(history)
    history.step(17, [0, 17, 0])
    history.check()
    history.cache.reset()
    history = History(history.cache, seed=1)
    poison_free_pages(history)
    history.step(9)
    history.check()


def test_a_copy_on_write_needs_a_page_too(device: str) -> None:
    history = History(make(device, num_pages=4))
    history.step(13, [13, 0, 0])
    history.fork(0, 1)
    history.step(14, [0, 0, 14])
    before = snapshot(history.cache)
    with pytest.raises(CacheFullError, match="out of pages: 1 needed, 0"):
        history.cache.advance(1, [0, 1, 0])
    assert same_snapshot(before, snapshot(history.cache))
    history.free(2)
    history.step(1, [0, 1, 0])
    history.check()
