"""PagedKVCache against plain tensors: contents, bounds, capacity and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.cache_model import History, same_snapshot, snapshot
from helpers.small_caches import BOUNDS, make, poison_free_pages
from quest_ops import CacheFullError, PagedKVCache
from quest_ops.ops import HEAD_DIMS, PAGE_SIZES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_steps_of_any_size_land_in_their_pages(device: str, page_size: int, dtype: torch.dtype) -> None:
    steps = (1, page_size - 1, 1, page_size, 2 * page_size + 3, page_size - 3, 1)
    history = History(make(device, page_size=page_size, max_tokens=sum(steps), batch_size=2, dtype=dtype))
    for T in steps:
        history.step(T)
        history.check()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(device: str, head_dim: int) -> None:
    history = History(PagedKVCache(1, 3, head_dim, max_tokens=40, page_size=16, device=device))
    history.step(33)
    history.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_bounds_of_layers_and_their_size(device: str, dtype: torch.dtype) -> None:
    history = History(make(device, dtype=dtype, bounds="int8"))
    cache = history.cache
    assert cache.bounds == "int8"
    assert (cache.k_bounds.dtype, cache.k_scales.dtype) == (torch.int8, torch.float32)
    assert cache.k_scales.shape == cache.k_bounds.shape[:3]
    for T, lens in ((19, [19, 8, 3]), (1, None), (6, [6, 0, 5]), (1, None)):
        history.step(T, lens)
        history.check()
    assert [x.data_ptr() for x in cache.layer(1)] == [pool[1].data_ptr() for pool in cache.pools]
    assert make(device, bounds="cache").layer(1).k_scales is None


def test_ragged_steps_from_host_numbers(device: str) -> None:
    history = History(make(device))
    for T, lens in ((20, [20, 0, 7]), (1, [0, 1, 1]), (9, [9, 8, 0]), (2, [0, 0, 0])):
        history.step(T, lens)
        history.check()


def test_ragged_steps_from_device_numbers(device: str) -> None:
    history, lens = History(make(device)), [5, 0, 20]
    k, v = history.new_tokens(20, lens)
    history.cache.advance(20, torch.tensor(lens, dtype=torch.int32, device=device))
    for layer in range(2):
        history.cache.append(layer, k[layer].to(device), v[layer].to(device))
    history.record(k, v, lens)
    assert history.cache.lengths == (lens if device == "cpu" else [20, 20, 20])  # numbers on a GPU are not read
    assert history.cache.sync_lengths() == lens
    history.check()
    history.step(3)
    history.check()


@pytest.mark.gpu
def test_device_numbers_are_clamped_like_the_kernels_clamp_them() -> None:
    cache = make("cuda")
    cache.advance(4, torch.tensor([-3, 9, 2], dtype=torch.int32, device="cuda"))
    assert cache.sync_lengths() == [0, 4, 2]


@BOUNDS
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 20, 21, 60])
def test_crop_then_append(device: str, tokens: int, bounds: str) -> None:
    history = History(make(device, bounds=bounds))
    history.step(21, [21, 17, 3])
    history.crop(tokens, 0)
    history.check()
    history.crop(tokens)
    history.check()
    poison_free_pages(history)
    history.step(11)
    history.check()


def test_crop_of_lengths_the_host_does_not_know(device: str) -> None:
    history, lens = History(make(device)), [5, 12, 20]
    history.step(3)
    k, v = history.new_tokens(20, lens)
    history.cache.advance(20, torch.tensor(lens, dtype=torch.int32, device=device))
    for layer in range(2):
        history.cache.append(layer, k[layer].to(device), v[layer].to(device))
    history.record(k, v, lens)
    history.crop(13)  # among the lengths 8, 15 and 23
    history.cache.sync_lengths()
    history.check()


def test_crop_gives_pages_back(device: str) -> None:
    cache = make(device, num_pages=6)
    cache.advance(16)
    assert cache.free_pages == 0
    cache.crop(8, 1)
    assert cache.free_pages == 1
    cache.crop(0)
    assert cache.free_pages == 6
    assert cache.lengths == [0, 0, 0]


def test_crop_to_the_length_keeps_the_reserved_pages(device: str) -> None:
    cache = make(device)
    cache.advance(8)
    cache.reserve(20)
    assert cache.free_pages == 24 - 12
    cache.crop(8)
    assert cache.free_pages == 24 - 12
    cache.crop(7)
    assert cache.free_pages == 24 - 3


def test_defaults_and_dtype() -> None:
    cache = PagedKVCache(1, 2, 64, max_tokens=16)
    assert cache.device.type == "cpu"
    assert cache.k_cache.dtype == cache.v_cache.dtype == torch.bfloat16
    half = PagedKVCache(1, 2, 64, max_tokens=16, dtype=torch.float16)
    assert half.k_cache.dtype == half.v_cache.dtype == torch.float16


def test_a_pool_smaller_than_the_page_table(device: str) -> None:
    history = History(make(device, num_pages=8))  # the table has 24 entries
    history.step(50, [50, 0, 0])
    with pytest.raises(CacheFullError, match="out of pages: 2 needed, 1 of num_pages = 8 are free"):
        history.cache.advance(9, [0, 9, 0])
    history.free(0)
    history.step(40, [0, 24, 40])
    assert history.cache.free_pages == 0
    history.check()


def test_reserve_makes_room_and_only_once(device: str) -> None:
    cache = make(device)
    cache.reserve(0)
    assert cache.free_pages == 24
    cache.reserve(20)
    assert cache.free_pages == 24 - 9
    assert cache.lengths == [0, 0, 0]
    table = cache.page_table.clone()
    cache.reserve(20)
    for _ in range(20):
        cache.advance(1)
    assert torch.equal(cache.page_table, table)
    cache.reserve(5, 2)
    assert (cache.page_table >= 0).sum(1).tolist() == [3, 3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.advance(8), "out of pages: 3 needed, 2 of num_pages = 9 are free"),
        (lambda c: c.reserve(24, 1), "out of pages: 3 needed, 2"),
        (lambda c: c.advance(17, [0, 17, 0]), "out of pages: 3 needed, 2"),
        (lambda c: c.advance(60, [1, 0, 60]), r"sequence 2 must stay within max_tokens, 64, got 24 \+ 60 tokens"),
    ],
)
def test_a_full_cache_changes_nothing(device: str, call: Callable[[PagedKVCache], None], message: str) -> None:
    history = History(make(device, num_pages=9))
    history.step(16, [16, 16, 16])
    history.step(8, [0, 0, 8])
    before = snapshot(history.cache)
    with pytest.raises(CacheFullError, match=message):
        call(history.cache)
    assert same_snapshot(before, snapshot(history.cache))
    history.check()


@BOUNDS
def test_reset_empties_everything_in_place(device: str, bounds: str) -> None:
    history = History(make(device, bounds=bounds))
    cache = history.cache
    tensors = (*cache.pools, cache.page_table, cache.seq_lens, cache.start_lens)
    addresses = [t.data_ptr() for t in tensors]
    history.step(20)
    history.fork(0, 1)
    history.crop(9, 2)
    history.step(2)
    cache.reset()
    assert cache.lengths == cache.seq_lens.tolist() == cache.start_lens.tolist() == [0, 0, 0]
    assert cache.free_pages == cache.num_pages
    assert (cache.page_table == -1).all()
    again = (*cache.pools, cache.page_table, cache.seq_lens, cache.start_lens)
    assert [t.data_ptr() for t in again] == addresses


def test_a_layer_takes_one_append_a_step(device: str) -> None:
    cache = make(device)
    k = torch.randn(3, 2, 2, 64, device=device)
    message = r"layer 1 has no open step: call cache.advance\(T\) once a step"
    with pytest.raises(RuntimeError, match=message):
        cache.append(1, k, k)
    cache.advance(2)
    cache.append(1, k, k)
    before = snapshot(cache)
    with pytest.raises(RuntimeError, match=message):
        cache.append(1, k, k)
    with pytest.raises(RuntimeError, match=r"k must have the T of cache.advance, 2, in dimension 1, got 1"):
        cache.append(0, k[:, :1], k[:, :1])
    assert same_snapshot(before, snapshot(cache))
    cache.append(0, k, k)
    cache.crop(1)
    with pytest.raises(RuntimeError, match=message):
        cache.append(1, k, k)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.advance(0), "num_new must be at least 1, got 0"),
        (lambda c: c.advance(2, [1, 1]), r"new_lens must hold 3 numbers from 0 to num_new, 2, got \[1, 1\]"),
        (lambda c: c.advance(2, [0, 3, 1]), r"new_lens must hold 3 numbers from 0 to num_new, 2, got \[0, 3, 1\]"),
        (
            lambda c: c.advance(2, torch.tensor([0, -1, 1], dtype=torch.int32)),
            r"new_lens must hold .* got \[0, -1, 1\]",
        ),
        (lambda c: c.advance(2, torch.tensor([0, 1, 1])), r"new_lens must be int32 \[3\], got torch.int64 \[3\]"),
        (lambda c: c.reserve(-1), "tokens must be at least 0, got -1"),
        (lambda c: c.reserve(1, 3), "sequence must be 0 to 2, got 3"),
        (lambda c: c.crop(-1), "tokens must be at least 0, got -1"),
        (lambda c: c.crop(1, -1), "sequence must be 0 to 2, got -1"),
        (lambda c: c.fork(0, 0), "target must be another sequence than source, got 0"),
        (lambda c: c.fork(0, 3), "target must be 0 to 2, got 3"),
        (lambda c: c.fork(5, 0), "source must be 0 to 2, got 5"),
        (lambda c: c.free(7), "sequence must be 0 to 2, got 7"),
        (lambda c: c.layer(2), "layer must be 0 to 1, got 2"),
    ],
)
def test_bad_arguments(device: str, call: Callable[[PagedKVCache], None], message: str) -> None:
    history = History(make(device))
    history.step(9)
    before = snapshot(history.cache)
    with pytest.raises(ValueError, match=message):
        call(history.cache)
    assert same_snapshot(before, snapshot(history.cache))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 24}, "page_size must be one of 4, 8, 16, 32, 64, 128, got 24"),
        ({"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
        ({"bounds": "int2"}, "bounds must be one of cache, int8, int4, got int2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
    ],
)
def test_bad_sizes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("cpu", **changes)
    with pytest.raises(ValueError, match=r"head_dim must be one of 64, .*, got 100"):
        PagedKVCache(1, 1, 100, max_tokens=1)


def test_lengths_that_moved_unseen_must_be_read_first(device: str) -> None:
    history = History(make(device))
    cache = history.cache
    compiled = torch.compile(cache.advance, fullgraph=True, backend="eager")
    history.step(5)
    cache.reserve(3)
    for _ in range(3):
        compiled(1)
    assert cache.seq_lens.tolist() == [8, 8, 8]
    calls = (lambda: cache.lengths, lambda: cache.advance(1), lambda: cache.reserve(1), lambda: cache.crop(1))
    for call in (*calls, lambda: cache.fork(0, 1)):
        with pytest.raises(RuntimeError, match=r"call sync_lengths\(\) first"):
            call()
    assert cache.sync_lengths() == cache.lengths == [8, 8, 8]
    compiled(1)
    with pytest.raises(RuntimeError, match="within the reserved pages, 8 tokens for sequence 0, got 9"):
        cache.sync_lengths()
    cache.reset()
    assert cache.lengths == [0, 0, 0]
