"""The promises of docs/reliability.md about threads, streams and devices.

Each thread has caches of its own, or sequences of its own in one pool. Results have the bits of serial calls.
tests/operators/test_changing_values.py has the tensors that change during a call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import soak
import torch
from helpers.operator_cases import KINDS, Case, Kind, Shape, assert_same_bits
from helpers.small_caches import make
from helpers.steps import before_step, caches, on, one_step
from quest_ops import PagedKVCache, QuestConfig, ops, quest_attention
from torch import Tensor

THREADS = 8
ALL_KINDS = pytest.mark.parametrize(
    "kind", [KINDS["minmax"], KINDS["mean-std-4-bit"]], ids=["minmax", "mean-std-4-bit"]
)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that start together, each in a thread of its own. Any exception is raised here."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=300) for future in [pool.submit(call) for call in calls]]


@pytest.fixture
def several_threads_an_operator() -> Iterator[None]:
    before = torch.get_num_threads()
    # ThreadSanitizer does not see the barriers of torch's own threads.
    torch.set_num_threads(int(os.environ.get("QUEST_OPS_TEST_THREADS", "3")))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("several_threads_an_operator")
def test_caches_of_their_own_in_many_threads(device: str) -> None:
    """Steps, appends, crops, forks and resets of eight caches."""
    if device == "cuda":  # a capture fails while another thread allocates, which torch documents
        alone = [decoded_alone(device, seed) for seed in range(THREADS)]
        together = at_once([lambda seed=seed: decoded_alone(device, seed) for seed in range(THREADS)])
        assert_same_bits(torch.stack(together), torch.stack(alone))
        return
    alone = [soak.run(60, device, seed)["digest"] for seed in range(THREADS)]
    together = at_once([lambda seed=seed: soak.run(60, device, seed)["digest"] for seed in range(THREADS)])
    assert together == alone


def decoded_alone(device: str, seed: int) -> Tensor:
    """The outputs of some steps on a stream of their own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        random = torch.Generator().manual_seed(seed)
        cache = PagedKVCache(1, 2, 64, max_tokens=400, page_size=16, batch_size=2, device=device)
        config = QuestConfig(64, 16, dense_layers=0)
        outs = []
        for T in (150, *[1] * 40):
            q, k, v = (torch.randn(2, T, heads, 64, generator=random).bfloat16().to(device) for heads in (4, 2, 2))
            cache.advance(T)
            out = quest_attention(q, k, v, cache, 0, config)
            if T == 1:
                outs.append(out)
        result = torch.stack(outs)
    stream.synchronize()
    return result.cpu()


@ALL_KINDS
@pytest.mark.usefixtures("several_threads_an_operator")
def test_many_threads_read_one_pool(device: str, kind: Kind) -> None:
    shape = Shape(torch.bfloat16, 128, 16, 2, 4, lengths=(700, 90, 333), kind=kind)
    x = Case(shape).on(device)

    def call() -> tuple[Tensor, ...]:
        scores = ops.estimate(*x.scoring, 16, x.k_scales)
        pages = ops.topk_pages(scores, x.seq_lens, 16, 5, 2)
        return scores, pages, *ops.sparse_decode(*x.attention, pages)

    expected = call()
    for results in at_once([lambda: [call() for _ in range(10)]] * THREADS):
        for each in results:
            for actual, value in zip(each, expected, strict=True):
                assert_same_bits(actual, value)


def rows_of(x: Case, b: int) -> Case:
    """One sequence's arguments of a step, over the pool of all."""
    row = slice(b, b + 1)
    names = ("q", "k", "v", "page_table", "start_lens", "seq_lens")
    return x.having(**{name: getattr(x, name)[row] for name in names})


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_of_their_own_in_one_pool(device: str, dtype: torch.dtype, kind: Kind) -> None:
    """A thread for each sequence, and on a GPU a stream for each, writes and reads its own pages."""
    lengths = (700, 90, 333, 16, 1, 2000)
    case = before_step(Shape(dtype, 128, 16, 2, 4, lengths=lengths, kind=kind, seed=1))
    alone, together = on(case, device), on(case, device)
    expected = [one_step(rows_of(alone, b), 6) for b in range(len(lengths))]

    def call(b: int) -> tuple[Tensor, ...]:
        if device == "cpu":
            return one_step(rows_of(together, b), 6)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = one_step(rows_of(together, b), 6)
        stream.synchronize()
        return results

    if device == "cuda":
        torch.cuda.synchronize()
    results = at_once([lambda b=b: call(b) for b in range(len(lengths))])
    for actual, value in zip(results, expected, strict=True):
        for a, e in zip(actual, value, strict=True):
            assert_same_bits(a, e)
    for a, e in zip(caches(together), caches(alone), strict=True):
        assert_same_bits(a._base, e._base)


def test_a_cache_in_one_thread_after_another(device: str) -> None:
    """A cache belongs to one thread at a time, and any thread may be the next."""
    cache = make(device)
    one, other = copy.deepcopy(cache), copy.deepcopy(cache)
    k = torch.randn(2, 3, 1, 2, 64, generator=torch.Generator().manual_seed(0)).to(device)

    def step(c: PagedKVCache) -> None:
        c.advance(1)
        for layer in range(2):
            c.append(layer, k[layer], k[layer])

    for _ in range(20):
        step(one)
        at_once([lambda: step(other)])
    for a, e in zip(other.pools, one.pools, strict=True):
        assert_same_bits(a, e)
    assert other.lengths == one.lengths == [20] * 3


@pytest.mark.gpu
@ALL_KINDS
def test_many_streams_at_once_on_one_pool(kind: Kind) -> None:
    """Steps of 16 streams are in flight together, each longer than the GPU holds beside the others."""
    lengths = (4000,) * 16
    case = before_step(Shape(torch.bfloat16, 128, 16, 8, 4, lengths=lengths, kind=kind, seed=2))
    alone, together = on(case, "cuda"), on(case, "cuda")
    expected = [one_step(rows_of(alone, b), 32) for b in range(16)]
    streams = [torch.cuda.Stream() for _ in lengths]
    torch.cuda.synchronize()
    results: list[Any] = [None] * 16
    for _ in range(20):  # a step writes the same token again
        for b, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[b] = one_step(rows_of(together, b), 32)
    torch.cuda.synchronize()
    for actual, value in zip(results, expected, strict=True):
        for a, e in zip(actual, value, strict=True):
            assert_same_bits(a, e)
    for a, e in zip(caches(together), caches(alone), strict=True):
        assert_same_bits(a._base, e._base)


@pytest.mark.gpu
def test_a_cache_on_a_side_stream_behind_copies() -> None:
    """Page tables, lengths and keys that a side stream is still copying are not read early."""
    outs, config = [], QuestConfig(32, 8, dense_layers=0)
    for busy in (False, True):
        stream = torch.cuda.Stream()
        cache = make("cuda", batch_size=2)
        random = torch.Generator().manual_seed(3)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(30):
                if busy:
                    torch.cuda._sleep(2_000_000)
                q, k, v = (
                    torch.randn(2, 1, heads, 64, generator=random).pin_memory().to("cuda", non_blocking=True)
                    for heads in (4, 2, 2)
                )
                cache.advance(1)
                outs += [quest_attention(q, k, v, cache, layer, config) for layer in range(2)]
        stream.synchronize()
    half = len(outs) // 2
    assert_same_bits(torch.stack(outs[half:]), torch.stack(outs[:half]))


@pytest.mark.gpu
@ALL_KINDS
def test_two_devices(kind: Kind) -> None:
    """Calls follow their tensors, whatever the current device, with the bits of the first device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one GPU")
    case = before_step(Shape(torch.bfloat16, 128, 16, 2, 4, lengths=(700, 90, 333), kind=kind, seed=4))
    x = [on(case, f"cuda:{i}") for i in range(2)]
    with torch.cuda.device(0):
        first, second = one_step(x[0], 6), one_step(x[1], 6)
    for a, e in zip(second, first, strict=True):
        assert a.device == torch.device("cuda", 1)
        assert_same_bits(a.cpu(), e.cpu())
    for a, e in zip(caches(x[1]), caches(x[0]), strict=True):
        assert_same_bits(a._base.cpu(), e._base.cpu())
    together = at_once([lambda i=i: [y.cpu() for y in one_step(x[i], 6)] for i in range(2)])
    for a, e in zip(*together, strict=True):
        assert_same_bits(a, e)
    with pytest.raises(RuntimeError, match="must be on cuda:0 like q, got cuda:1"):
        ops.estimate(x[0].q, *x[1].scoring[1:], 16, x[1].k_scales)
