"""Failures of PagedKVCache at every device operation: nothing has changed, or all of it, and a retry works."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cache_model import History
from helpers.failing import FailingAt
from helpers.small_caches import BOUNDS, S, make
from quest_ops import PagedKVCache
from torch import Tensor

Call = Callable[[PagedKVCache], object]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


def state(cache: PagedKVCache) -> list[Any]:
    """All that may be seen of a cache: its numbers, and the bits of the pages that are owned."""
    owned = sorted(set(cache.page_table.flatten().tolist()) - {-1})
    numbers = [x.tolist() for x in (cache.page_table, cache.seq_lens, cache.start_lens, cache.new_lens)]
    account = [cache._allocator.tables, cache._allocator.low, cache._allocator.high, cache._allocator.owners]
    flags = [cache.ragged, cache.starts_empty, cache._stale, vars(cache._steps), sorted(cache._allocator.free)]
    return [*(bits(pool[:, owned]) for pool in cache.pools), repr((owned, numbers, account, flags))]


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def forked(device: str, bounds: str, poison_freed: bool = False) -> History:
    """Sequences 0 and 1 share a full page and one that is written next; sequence 2 has pages of its own."""
    history = History(make(device, bounds=bounds, poison_freed=poison_freed))
    history.step(21, [21, 4, 14])
    history.fork(0, 1)
    return history


CALLS: dict[str, Call] = {
    "advance": lambda c: c.advance(5),
    "advance_ragged": lambda c: c.advance(9, [1, 0, 9]),
    "advance_by_a_tensor": lambda c: c.advance(3, torch.tensor([3, 1, 0], dtype=torch.int32, device=c.device)),
    "reserve": lambda c: c.reserve(20),
    "reserve_one": lambda c: c.reserve(1, 1),
    "crop": lambda c: c.crop(10),
    "crop_a_shared_page": lambda c: c.crop(18, 1),
    "crop_at_a_page": lambda c: c.crop(S, 2),
    "fork": lambda c: c.fork(2, 0),
    "free": lambda c: c.free(1),
    "free_all_of_it": lambda c: c.free(2),
    "reset": lambda c: c.reset(),
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), KeyboardInterrupt()], ids=["out_of_memory", "interrupt"])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CALLS)
@BOUNDS
def test_a_failure_at_any_operation(device: str, bounds: str, name: str, done: bool, error: BaseException) -> None:
    call, poison_freed = CALLS[name], name != "reserve"
    undisturbed = forked(device, bounds, poison_freed).cache
    with FailingAt(0, error, done) as counter:
        call(undisturbed)
    complete = state(undisturbed)
    assert counter.calls > 0
    unchanged = 0
    for n in range(1, counter.calls + 1):
        history = forked(device, bounds, poison_freed)
        cache, before = history.cache, state(history.cache)
        with pytest.raises(type(error)), FailingAt(n, error, done):
            call(cache)
        if same(state(cache), before):
            unchanged += 1
            history.check()
            call(cache)
        assert same(state(cache), complete), f"operation {n} of {counter.calls}"
    assert unchanged > 0


@BOUNDS
def test_the_retry_after_a_failed_copy_writes_its_own_page(device: str, bounds: str) -> None:
    history = forked(device, bounds)
    with FailingAt(0, KeyboardInterrupt(), False) as counter:
        forked(device, bounds)
    for n in range(1, counter.calls + 1):
        history = forked(device, bounds)
        failing = FailingAt(n, torch.OutOfMemoryError(), False)
        try:
            with failing:
                history.cache.advance(1, [0, 1, 0])
        except torch.OutOfMemoryError:
            pass
        else:
            break
        history.step(1, [0, 1, 0])
        history.step(1, [1, 0, 0])
        history.check()
    assert n > 3


@BOUNDS
def test_an_append_that_fails_can_be_repeated(device: str, bounds: str) -> None:
    for done in (False, True):
        for n in range(1, 20):
            history = forked(device, bounds)
            cache = history.cache
            k, v = history.new_tokens(5)
            cache.advance(5)
            new = [(layer, k[layer].to(device), v[layer].to(device)) for layer in range(2)]
            with FailingAt(n, KeyboardInterrupt(), done) as failing, contextlib.suppress(KeyboardInterrupt):
                cache.append(*new[0])
            if failing.calls < n:
                break
            for arguments in new:
                cache.append(*arguments)
            history.record(k, v)
            history.check()
        assert 3 < n < 19


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), KeyboardInterrupt()], ids=["out_of_memory", "interrupt"])
def test_sync_lengths_that_fails_can_be_repeated(
    device: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = forked(device, "int8").cache
    cache.reserve(3)
    torch.compile(cache.advance, fullgraph=True, backend="eager")(3)
    before = state(cache)

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", fails)
        with pytest.raises(type(error)):
            cache.sync_lengths()
    assert same(state(cache), before)
    assert cache.sync_lengths() == cache.lengths == [24, 24, 17]


@pytest.mark.parametrize(
    ("where", "name"), [(lambda c: c._allocator, "grow"), (lambda c: c, "_follow")], ids=["amid", "before"]
)
def test_an_interrupt_of_the_account_refuses_everything_but_reset(
    device: str, where: Call, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = forked(device, "int8")
    cache = history.cache

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where(cache), name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.advance(1)
    calls: list[Call] = [call for name, call in CALLS.items() if name != "reset"]
    for call in [*calls, lambda c: c.lengths, lambda c: c.sync_lengths()]:
        with pytest.raises(RuntimeError, match=r"an interrupt stopped a change .*: call reset\(\)"):
            call(cache)
    cache.reset()
    history = History(cache, seed=1)
    history.step(21, [21, 4, 14])
    history.check()


# Freed pages


def free_pages(cache: PagedKVCache) -> list[int]:
    return sorted(set(range(cache.num_pages)) - set(cache.page_table.flatten().tolist()))


def assert_free_pages_are_nan(cache: PagedKVCache) -> None:
    pages = free_pages(cache)
    assert pages
    for pool in cache.pools:
        assert not pool.is_floating_point() or pool[:, pages].isnan().all()


@BOUNDS
def test_freed_pages_hold_nan(device: str, bounds: str) -> None:
    history = forked(device, bounds, poison_freed=True)
    cache = history.cache
    for call in (
        lambda: history.crop(9, 2),
        lambda: history.fork(2, 0),
        lambda: history.step(9, [9, 1, 9]),
        lambda: history.free(1),
        lambda: history.step(17, [0, 17, 3]),
        lambda: history.crop(3),
    ):
        for pool in cache.pools:  # what an earlier user left shows
            if pool.is_floating_point():
                pool[:, free_pages(cache)] = torch.nan
        call()
        assert_free_pages_are_nan(cache)
        history.check()
    cache.reset()
    assert_free_pages_are_nan(cache)
    assert len(free_pages(cache)) == cache.num_pages


@BOUNDS
def test_a_new_pool_holds_nan(device: str, bounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"max_tokens": 64, "page_size": S, "dtype": torch.float32, "bounds": bounds, "device": device}
    monkeypatch.delenv("QUEST_OPS_POISON", raising=False)
    assert not PagedKVCache(2, 2, 64, **sizes).poison_freed
    assert_free_pages_are_nan(PagedKVCache(2, 2, 64, **sizes, poison_freed=True))
    monkeypatch.setenv("QUEST_OPS_POISON", "1")
    assert_free_pages_are_nan(PagedKVCache(2, 2, 64, **sizes))
    assert not PagedKVCache(2, 2, 64, **sizes, poison_freed=False).poison_freed


def test_pages_whose_poisoning_or_copy_failed_are_poisoned_before_they_are_given_out(device: str) -> None:
    for name in ("free_all_of_it", "advance"):
        call, n = CALLS[name], 0
        while True:
            n += 1
            cache = forked(device, "cache", poison_freed=True).cache
            with FailingAt(n, KeyboardInterrupt(), False) as failing, contextlib.suppress(KeyboardInterrupt):
                call(cache)
            cache.reserve(1, 0)
            assert_free_pages_are_nan(cache)
            if failing.calls < n:
                break
        assert n > 5


# Layers that are left out


def layers_of(history: History, T: int, layers: tuple[int, ...], lens: list[int] | None = None) -> None:
    """A step in which only some layers write."""
    k, v = history.new_tokens(T, lens)
    history.cache.advance(T, lens)
    for layer in layers:
        history.cache.append(layer, k[layer].to(history.cache.device), v[layer].to(history.cache.device))


LEFT_OUT = r"layer 1 has not written sequence {} from token {} on.*: crop the sequence to {} tokens, free it, or reset"


def append(history: History, layer: int, T: int) -> None:
    k, v = history.new_tokens(T)
    history.cache.append(layer, k[layer].to(history.cache.device), v[layer].to(history.cache.device))


@pytest.mark.parametrize("way_on", ["crop", "free", "reset"])
@pytest.mark.parametrize("written", [(0,), ()], ids=["early_exit", "never_appended"])
def test_a_layer_left_out_of_a_step_is_refused(device: str, written: tuple[int, ...], way_on: str) -> None:
    history = History(make(device))
    cache = history.cache
    history.step(9, [5, 9, 5])
    layers_of(history, 2, written, [0, 2, 1])
    cache.advance(1)
    if written:
        append(history, 0, 1)
    poisoned = [pool.clone() for pool in cache.pools]
    with pytest.raises(RuntimeError, match=LEFT_OUT.format(1, 9, 9)):
        append(history, 1, 1)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(poisoned, cache.pools, strict=True))
    if way_on == "crop":
        for b, length in enumerate((5, 9, 5)):
            cache.crop(length, b)
    elif way_on == "free":
        for b in range(3):
            history.free(b)
    else:
        cache.reset()
        history = History(cache, seed=1)
    for _ in range(3):
        history.step(3)
        history.check()


def test_only_the_sequences_of_the_step_are_refused(device: str) -> None:
    """A request that failed does not hold up the others, nor do forks hide it."""
    history = History(make(device))
    cache = history.cache
    history.step(5)
    layers_of(history, 2, (0,), [2, 0, 0])
    history.cache.advance(1, [0, 1, 1])
    for layer in range(2):
        append(history, layer, 1)
    cache.fork(0, 2)
    cache.free(0)
    cache.advance(1, [1, 1, 0])
    append(history, 1, 1)
    cache.advance(1, [0, 0, 1])
    with pytest.raises(RuntimeError, match=LEFT_OUT.format(2, 5, 5)):
        append(history, 1, 1)
    cache.crop(6, 2)
    cache.advance(1, [0, 0, 1])
    with pytest.raises(RuntimeError, match=LEFT_OUT.format(2, 5, 5)):
        append(history, 1, 1)
    cache.crop(5, 2)
    cache.advance(1, [0, 0, 1])
    append(history, 1, 1)


def test_reading_the_lengths_does_not_hide_a_layer_left_out(device: str) -> None:
    history = History(make(device))
    history.step(5)
    layers_of(history, 2, (0,))
    history.cache.advance(1)
    assert history.cache.sync_lengths() == [8, 8, 8]
    with pytest.raises(RuntimeError, match=LEFT_OUT.format(0, 5, 5)):
        append(history, 1, 1)


def test_steps_of_compiled_layers_are_not_missed(device: str) -> None:
    """The host does not see what compiled code writes, so eager steps after it are not refused."""
    torch._dynamo.reset()
    history = History(make(device))
    cache = history.cache
    history.step(5)

    def layers(k: Tensor, v: Tensor) -> None:
        for layer in range(2):
            cache.append(layer, k[layer], v[layer])

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        k, v = history.new_tokens(1)
        cache.advance(1)
        compiled(k.to(device), v.to(device))
        history.record(k, v)
    history.step(4)
    history.check()


# Inference mode


@BOUNDS
def test_a_cache_made_under_inference_mode_is_used_outside(device: str, bounds: str) -> None:
    with torch.inference_mode():
        history = History(make(device, bounds=bounds, poison_freed=True))
        history.cache.start_report()
        history.step(9)
    history.step(3)
    history.fork(0, 1)
    with torch.inference_mode():
        history.crop(10)
    history.step(5)
    history.check()
    cache = history.cache
    assert not any(x.is_inference() for x in (*cache.pools, cache.page_table, cache.seq_lens, cache.counts._counts))
