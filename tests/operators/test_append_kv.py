"""append_kv and update_bounds: copies and bounds equal the reference exactly; nothing else changes."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.operator_cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    Case,
    Kind,
    Shape,
    assert_exact,
    assert_same_bits,
    place,
    place_far_apart,
    shapes,
)
from hypothesis import example, given
from hypothesis import strategies as st
from quest_ops import ops, reference
from torch import Tensor


class Cache:
    """A cache that holds garbage beside the keys of its tokens, on the device and on the CPU."""

    def __init__(self, shape: Shape, device: str):
        case = Case(shape)
        self.host = [case.k_cache.clone(), case.v_cache.clone(), torch.rand_like(case.k_bounds) * 1e4 - 5e3]
        self.layouts = [LAYOUTS[i] for i in shape.layouts[1:]]
        self.device = [place(x, layout, device) for x, layout in zip(self.host, self.layouts, strict=True)]
        self.page_table = place(case.page_table, "sliced", device)

    def assert_became(self, *expected: Tensor) -> None:
        """k_cache, v_cache and k_bounds equal these, and no bit beside them has changed."""
        for actual, layout, value in zip(self.device, self.layouts, expected, strict=True):
            assert_same_bits(actual._base, place(value, layout, "cpu")._base)


kinds = st.sampled_from((KINDS["minmax"], KINDS["mean-std"]))


def lengths_on(device: str, lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else place(lengths.int(), "unaligned", device)


@given(shapes(max_shared_pages=0), kinds, st.integers(0, 300), st.booleans(), st.integers(0, 3), st.data())
def test_append_meets_the_reference(
    device: str, shape: Shape, kind: Kind, new: int, ragged: bool, layout: int, data: st.DataObject
) -> None:
    """The page table holds the sequences with their new tokens; the lengths before are drawn."""
    new = min(new, 3 * shape.page_size + 1)
    counts = [data.draw(st.integers(0, min(new, n))) if ragged else min(new, *shape.lengths) for n in shape.lengths]
    T = max(counts) + (data.draw(st.integers(0, 2)) if ragged else 0)
    cache = Cache(shape, device)
    k, v = (torch.randn(len(counts), T, shape.kv_heads, shape.head_dim).to(shape.dtype) for _ in "kv")
    for b, count in enumerate(counts):
        k[b, count:] = v[b, count:] = math.nan
    before = torch.tensor(shape.lengths).int() - torch.tensor(counts).int()
    new_lens = torch.tensor(counts).int() if ragged else None
    expected = reference.append_kv(k, v, *cache.host, cache.page_table.cpu(), before, new_lens, None, kind.std_factor)
    ops.append_kv(
        place(k, LAYOUTS[layout], device),
        place(v, LAYOUTS[shape.layouts[0]], device),
        *cache.device,
        cache.page_table,
        lengths_on(device, before),
        lengths_on(device, new_lens),
        std_factor=kind.std_factor,
    )
    cache.assert_became(*expected)


@given(shapes(max_shared_pages=0), kinds, st.lists(st.integers(0, 1400), min_size=4, max_size=4) | st.none())
def test_update_bounds_meets_the_reference(device: str, shape: Shape, kind: Kind, first: list[int] | None) -> None:
    cache = Cache(shape, device)
    first_token = None if first is None else torch.tensor(first[: len(shape.lengths)]).int()
    seq_lens = torch.tensor(shape.lengths).int()
    k_cache, v_cache, k_bounds = cache.host
    where = (cache.page_table.cpu(), seq_lens, first_token, kind.std_factor)
    expected = reference.update_bounds(k_cache, k_bounds, *where)
    ops.update_bounds(
        cache.device[0],
        cache.device[2],
        cache.page_table,
        lengths_on(device, seq_lens),
        lengths_on(device, first_token),
        std_factor=kind.std_factor,
    )
    cache.assert_became(k_cache, v_cache, expected)


@given(shapes(max_shared_pages=0), kinds, st.lists(st.integers(0, 70), min_size=1, max_size=12))
@example(Shape(lengths=(64, 64)), KINDS["minmax"], [1] * 40)
@example(Shape(lengths=(64, 64)), KINDS["mean-std"], [1] * 40)
def test_appends_add_up(device: str, shape: Shape, kind: Kind, steps: list[int]) -> None:
    """Many appends across page boundaries equal a single pass over all tokens."""
    total = sum(steps)
    shape = replace(shape, kind=kind, lengths=tuple(total for _ in shape.lengths[:2]))
    case = Case(shape)
    cache = Cache(shape, device)
    for x in cache.device:
        x.fill_(math.nan)
    done = 0
    for T in steps:
        k, v = (torch.stack([x[done : done + T] for x in tokens]).to(device) for tokens in (case.keys, case.values))
        before = lengths_on(device, torch.full((len(k),), done))
        ops.append_kv(k, v, *cache.device, cache.page_table, before, std_factor=kind.std_factor)
        done += T
    cache.assert_became(case.k_cache, case.v_cache, case.k_bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_key_shows_in_both_bounds(device: str, dtype: torch.dtype) -> None:
    shape = Shape(dtype=dtype, lengths=(40, 23), page_size=8)
    cache = Cache(shape, device)
    k, v = (torch.randn(2, 20, shape.kv_heads, shape.head_dim).to(dtype) for _ in "kv")
    k[0, 3, 1, 5] = k[1, 19, 0, 63] = math.nan
    k[0, 11, 0, 7], k[1, 2, 1, 0] = math.inf, -math.inf
    before = torch.tensor([20, 3], dtype=torch.int32)
    expected = reference.append_kv(k, v, *cache.host, cache.page_table.cpu(), before)
    ops.append_kv(k.to(device), v.to(device), *cache.device, cache.page_table, before.to(device))
    cache.assert_became(*expected)
    for page, head, dim in ((cache.page_table[0, 23 // 8], 1, 5), (cache.page_table[1, 22 // 8], 0, 63)):
        assert cache.device[2][page, head, :, dim].isnan().all()


def test_pool_past_2_31_elements(device: str) -> None:
    shape = Shape(dtype=torch.float16, lengths=(20, 11), spare_pages=0)
    case = Case(shape)
    k_cache, v_cache, k_bounds = (place_far_apart(x, device) for x in (case.k_cache, case.v_cache, case.k_bounds))
    k_cache.fill_(math.nan), v_cache.fill_(math.nan), k_bounds.fill_(math.nan)
    k, v = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True).to(device) for x in (case.keys, case.values))
    table, lengths = case.page_table.to(device), case.seq_lens.to(device)
    ops.append_kv(k, v, k_cache, v_cache, k_bounds, table, torch.zeros_like(lengths), lengths)
    for actual, expected in ((k_cache, case.k_cache), (v_cache, case.v_cache), (k_bounds, case.k_bounds)):
        assert_same_bits(actual, expected)
    k_bounds.fill_(7)
    ops.update_bounds(k_cache, k_bounds, table, lengths)
    unused = torch.ones(len(case.k_bounds), dtype=torch.bool)
    for b, n in enumerate(shape.lengths):
        unused[case.page_table[b, : reference.num_pages(n, shape.page_size)].long()] = False
    assert_exact(k_bounds, case.k_bounds.masked_fill(unused[:, None, None, None], 7))


def test_nothing_to_do(device: str) -> None:
    """No new tokens, no sequences, no capacity: no write and no error."""
    cache = Cache(Shape(lengths=(0, 16, 17)), device)
    before = [x._base.clone() for x in cache.device]
    none = torch.empty(3, 0, 2, 64, device=device)
    seq_lens = torch.tensor([0, 16, 17], dtype=torch.int32, device=device)
    ops.append_kv(none, none, *cache.device, cache.page_table, seq_lens)
    some = torch.ones(3, 5, 2, 64, device=device)
    ops.append_kv(some, some, *cache.device, cache.page_table, seq_lens, torch.zeros_like(seq_lens))
    ops.append_kv(some[:0], some[:0], *cache.device, cache.page_table[:0], seq_lens[:0])
    ops.append_kv(none, none, *cache.device, cache.page_table[:, :0], torch.zeros_like(seq_lens))
    ops.update_bounds(cache.device[0], cache.device[2], cache.page_table, torch.zeros_like(seq_lens))
    ops.update_bounds(cache.device[0], cache.device[2], cache.page_table[:0], seq_lens[:0])
    for actual, expected in zip(cache.device, before, strict=True):
        assert_same_bits(actual._base, expected)
