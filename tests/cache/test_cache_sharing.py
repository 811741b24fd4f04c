"""Page ownership in PagedKVCache: forks, copies on write, freed pages, and calls in any order."""

from __future__ import annotations

import pytest
import torch
from helpers.cache_model import History, same_snapshot, snapshot
from helpers.small_caches import BOUNDS, S, make, poison_free_pages
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
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


class CacheMachine(RuleBasedStateMachine):
    """Calls in any order, with more tokens than the pool holds."""

    device = "cpu"
    sequence = st.integers(0, 2)

    @initialize(
        seed=st.integers(0, 1000), num_pages=st.integers(5, 12), bounds=st.sampled_from(("cache", "int8", "int4"))
    )
    def start(self, seed: int, num_pages: int, bounds: str) -> None:
        self.history = History(make(self.device, max_tokens=40, num_pages=num_pages, bounds=bounds), seed)
        self.cache = self.history.cache

    def expect(self, lens: list[int]) -> bool:
        """Whether the cache has room for these tokens; checks that an impossible step changes nothing."""
        too_long = any(n and have + n > 40 for have, n in zip(self.cache.lengths, lens, strict=True))
        reserved = (self.cache.page_table >= 0).sum(1).tolist()
        new = [
            max(0, -(-(have + n) // S) - pages) if n else 0
            for have, n, pages in zip(self.cache.lengths, lens, reserved, strict=True)
        ]
        if not too_long and sum(new) + self.copies(lens) <= self.cache.free_pages:
            return True
        before = snapshot(self.cache)
        with pytest.raises(CacheFullError):
            self.cache.advance(40, lens)
        assert same_snapshot(before, snapshot(self.cache))
        return False

    def copies(self, lens: list[int]) -> int:
        """Shared partial pages that several owners are about to write: all but a last owner copy them."""
        writers: dict[int, int] = {}
        for b, n in enumerate(lens):
            if n and self.cache.lengths[b] % S:
                page = int(self.cache.page_table[b, self.cache.lengths[b] // S])
                writers[page] = writers.get(page, 0) + 1
        owners = self.history.owners()
        return sum(min(count, owners[page] - 1) for page, count in writers.items())

    @rule(lens=st.tuples(*[st.integers(0, 12)] * 3), spare=st.integers(0, 2))
    def ragged_step(self, lens: tuple[int, ...], spare: int) -> None:
        if self.expect(list(lens)) and any(lens):
            self.history.step(max(lens) + spare, list(lens))

    @rule(T=st.integers(1, 3))
    def step(self, T: int) -> None:
        if self.expect([T] * 3):
            self.history.step(T)

    @rule(b=sequence, tokens=st.integers(0, 16))
    def reserve(self, b: int, tokens: int) -> None:
        if self.expect([tokens if i == b else 0 for i in range(3)]):
            self.cache.reserve(tokens, b)

    @rule(b=sequence | st.none(), tokens=st.integers(0, 40))
    def crop(self, b: int | None, tokens: int) -> None:
        self.history.crop(tokens, b)

    @rule(source=sequence, step=st.integers(1, 2))
    def fork(self, source: int, step: int) -> None:
        self.history.fork(source, (source + step) % 3)

    @rule(source=sequence, step=st.integers(1, 2), forked=st.booleans(), T=st.integers(0, 9))
    def fork_and_write_one(self, source: int, step: int, forked: bool, T: int) -> None:
        target = (source + step) % 3
        self.history.fork(source, target)
        lens = [T if b == (target if forked else source) else 0 for b in range(3)]
        if self.expect(lens):
            self.history.step(T + 1, lens)

    @rule(b=sequence)
    def free(self, b: int) -> None:
        self.history.free(b)

    @rule()
    def poison(self) -> None:
        poison_free_pages(self.history)

    @invariant()
    def is_as_given(self) -> None:
        if hasattr(self, "history"):
            self.history.check()


def test_any_order_of_calls(device: str) -> None:
    class Machine(CacheMachine):
        pass

    Machine.device = device
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=40))
