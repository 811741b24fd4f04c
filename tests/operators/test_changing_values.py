"""Another thread changes lengths and page numbers during a call. Each number is read once, so the call stays inside its
tensors: its result is right for some of the values, or it is refused.

AddressSanitizer finds what these tests cannot see: `make sanitize` runs them with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from quest_ops import ops
from torch import Tensor

SECONDS = 1.0
HKV, D, S, P = 1, 64, 8, 1024
REFUSED = (
    "must hold physical pages|must hold logical pages|must be 0 to|must be at least 0|must have room|must be start_"
)


def changing(x: Tensor, *values: Tensor) -> AbstractContextManager[None]:
    """Another thread writes these values to ``x`` by turns."""

    def write() -> None:
        for value in values:
            x.copy_(value)
        time.sleep(0)

    return repeating(write)


@contextmanager
def repeating(write: Callable[[], object]) -> Iterator[None]:
    """Another thread calls ``write`` again and again."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            write()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def repeat(call: Callable[[], Tensor | None], check: Callable[[Tensor], bool]) -> None:
    end, calls, refused = time.monotonic() + SECONDS, 0, 0
    while time.monotonic() < end or calls == 0:
        try:
            result = call()
        except RuntimeError as error:
            assert any(part in str(error) for part in REFUSED.split("|")), error  # noqa: PT017
            refused += 1
            assert refused < 10**6
            if time.monotonic() > end + 20:
                pytest.fail("no call was accepted")
            continue
        calls += 1
        assert result is None or check(result)


def numbered_pages() -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bounds [2 * P, ...] in which physical page i has the value i everywhere."""
    number = torch.arange(2 * P, dtype=torch.float32).view(-1, 1, 1, 1)
    values, bounds = (number.expand(-1, HKV, rows, D).contiguous() for rows in (S, 2))
    return torch.zeros(2 * P, HKV, S, D), values, bounds


TABLES = [torch.arange(P, dtype=torch.int32)[None], torch.arange(P, 2 * P, dtype=torch.int32)[None]]
NOWHERE = torch.full((1, P), -1, dtype=torch.int32)
FAR = torch.full((1, P), 2**31 - 1, dtype=torch.int32)


def test_estimate_with_a_changing_page_table() -> None:
    table, lens = TABLES[0].clone(), torch.tensor([P * S], dtype=torch.int32)
    bounds, q = numbered_pages()[2], torch.ones(1, 2, D)
    right = [x[0].float() * D for x in TABLES]

    def check(scores: Tensor) -> bool:
        return bool(((scores == right[0]) | (scores == right[1])).all())

    with changing(table, TABLES[1], NOWHERE, FAR, TABLES[0]):
        repeat(lambda: ops.estimate(q, bounds, table, lens, S), check)


@pytest.mark.parametrize("selected", [False, True], ids=["dense", "pages"])
def test_sparse_decode_with_a_changing_page_table(selected: bool) -> None:
    table, lens = TABLES[0].clone(), torch.tensor([P * S], dtype=torch.int32)
    keys, values, _ = numbered_pages()
    pages = torch.arange(0, P, 2, dtype=torch.int32).expand(1, HKV, -1) if selected else None
    q = torch.zeros(1, 2, D)  # all weights are equal, so the output is the mean of the pages' numbers
    low, high = (x[0, :: 2 if selected else 1].float().mean().item() for x in TABLES)

    def check(out: Tensor) -> bool:
        return bool(((out >= low - 1) & (out <= high + 1)).all())

    with changing(table, TABLES[1], NOWHERE, FAR, TABLES[0]):
        repeat(lambda: ops.sparse_decode(q, keys, values, table, lens, pages)[0], check)


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_sparse_decode_with_changing_lengths(new_tokens: int) -> None:
    lens = torch.tensor([8], dtype=torch.int32)
    keys, values, _ = numbered_pages()
    q = torch.zeros(1, new_tokens, 2, D)
    # One page has the mean 0, all of them the mean (P - 1) / 2; the first new tokens do not see the last of them.
    right = [(0.0, 0.01), ((P - 1) / 2 - 1, (P - 1) / 2 + 1)]

    def check(out: Tensor) -> bool:
        return any(bool(((out >= low) & (out <= high)).all()) for low, high in right)

    values_of_lens = [torch.tensor([x], dtype=torch.int32) for x in (P * S, 2**31 - 1, -5, 8)]
    with changing(lens, *values_of_lens):
        repeat(lambda: ops.sparse_decode(q, keys, values, TABLES[0], lens)[0], check)


def test_a_length_is_read_whole() -> None:
    """Not some bytes of one length and some of the next, as a copy by bytes would. The lengths change every few ns."""
    lens, written = torch.tensor([8, 8], dtype=torch.int32), torch.tensor([8, -5], dtype=torch.int32).repeat(10**6)
    keys, values, _ = numbered_pages()
    q, tables, always = torch.zeros(2, 2, D), TABLES[0].expand(2, -1), torch.zeros(len(written), dtype=torch.int64)
    with repeating(lambda: lens.scatter_(0, always, written)):
        repeat(lambda: ops.sparse_decode(q, keys, values, tables, lens)[0], lambda out: not bool(out.any()))


def test_sparse_decode_with_a_changing_page_list() -> None:
    lists = [torch.arange(0, P, 2, dtype=torch.int32), torch.arange(1, P, 2, dtype=torch.int32)]
    pages = lists[0].clone()
    keys, values, _ = numbered_pages()
    q, lens = torch.zeros(1, 2, D), torch.tensor([P * S], dtype=torch.int32)

    def check(out: Tensor) -> bool:  # -1 is padding, wherever it stands
        return bool(((out >= 0) & (out < P)).all())

    with changing(pages, lists[1], torch.full_like(pages, 2**31 - 1), torch.full_like(pages, -(2**31)), lists[0]):
        repeat(lambda: ops.sparse_decode(q, keys, values, TABLES[0], lens, pages.view(1, HKV, -1))[0], check)


@pytest.mark.parametrize(
    "name", ["topk_pages", "append_kv", "update_bounds", "decode_step", "dense topk_pages", "dense decode_step"]
)
def test_other_operators_with_changing_numbers(name: str) -> None:
    lens, table = torch.tensor([16], dtype=torch.int32), TABLES[0].clone()
    memory = [torch.zeros(2 * P + 2, *size) for size in ((HKV, S, D), (HKV, S, D), (HKV, 2, D))]
    caches = [x[1:-1] for x in memory]
    k, q, scores = torch.ones(1, 1, HKV, D), torch.ones(1, 2, D), torch.zeros(1, 2, P)
    call: Callable[[], Tensor | None] = {
        "topk_pages": lambda: ops.topk_pages(scores, lens, S, 4, HKV),
        "append_kv": lambda: ops.append_kv(k, k, *caches, table, lens),
        "update_bounds": lambda: ops.update_bounds(caches[0], caches[2], table, lens, lens),
        "decode_step": lambda: ops.decode_step(q, k, k, *caches, table, lens, lens + 1, 4)[2],
        "dense topk_pages": lambda: ops.topk_pages(scores, lens, S, 4, HKV, dense_below=16 * S),
        "dense decode_step": lambda: ops.decode_step(q, k, k, *caches, table, lens, lens + 1, 0)[2],
    }[name]

    def check(pages: Tensor) -> bool:
        return bool(((pages >= -1) & (pages < P)).all())

    all_lens = [torch.tensor([x], dtype=torch.int32) for x in (P * S - 8, 2**31 - 1, -(2**31), 16)]
    with changing(lens, *all_lens), changing(table, TABLES[1], NOWHERE, FAR, TABLES[0]):
        repeat(call, check)
    for x in memory:
        assert not x[0].any()
        assert not x[-1].any()
