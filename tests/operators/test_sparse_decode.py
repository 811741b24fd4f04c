"""sparse_decode: out and lse against the reference, by the error rule, with every unread key and value NaN."""

import math

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import (
    DTYPES,
    HEAD_DIMS,
    PAGE_SIZES,
    Case,
    Shape,
    assert_accurate,
    assert_exact,
    assert_same_bits,
    place,
    place_far_apart,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops, reference
from torch import Tensor


def decode(case: Case, device: str, pages: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    x = case.on(device)
    pages = None if pages is None else place(pages, "unaligned", device)
    return ops.sparse_decode(*x.attention, pages, scale)


def check(case: Case, device: str, pages: Tensor | None = None, scale: float | None = None) -> None:
    if pages is not None:
        case = case.poisoned(pages)
    out, lse = decode(case, device, pages, scale)
    assert out.dtype == case.shape.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    arguments = (*case.attention, pages, scale)
    likes = torch_baseline.in_several_orders(torch_baseline.sparse_decode, *arguments)
    results = (out, lse), reference.sparse_decode(*arguments), likes
    for actual, exact, like in zip(*results, strict=True):
        assert_accurate(actual, exact, like, case.shape.dtype)


@given(shapes(), st.integers(1, 12) | st.just(200), st.booleans(), st.booleans())
def test_selected_pages_meet_the_reference(device: str, shape: Shape, k: int, per_head: bool, shuffled: bool) -> None:
    case = Case(shape)
    check(case, device, case.random_pages(k, per_head, shuffled))


@given(shapes(), st.none() | st.floats(0.01, 1))
def test_dense_meets_the_reference(device: str, shape: Shape, scale: float | None) -> None:
    check(Case(shape), device, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_kind_of_page(device: str, dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    lengths = (5 * page_size, 3 * page_size + 1, 0, 1, 6 * page_size - 1)
    case = Case(Shape(dtype, head_dim, page_size, 2, 3, new_tokens=2, lengths=lengths, seed=1))
    check(case, device)
    check(case, device, case.random_pages(4, per_head=page_size == 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 7, 16, 20, 32])
def test_long_sequences(device: str, dtype: torch.dtype, group: int) -> None:
    """Many splits to combine."""
    case = Case(Shape(dtype, 64, 16, 1, group, lengths=(6001, 2500, 3), seed=3))
    check(case, device)
    check(case, device, case.random_pages(200, shuffled=True))
    check(case, device, case.random_pages(150, per_head=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(device: str, dtype: torch.dtype, sign: int) -> None:
    """Logits in the hundreds: exponentials over- or underflow unless the largest is subtracted first."""
    case = Case(Shape(dtype, lengths=(700, 40, 2), new_tokens=2))
    case.k_cache += 3
    case.q = (case.q + 6) * sign
    assert (reference.sparse_decode(*case.attention)[1] * sign > 90).all()
    check(case, device)
    check(case, device, scale=0.5)
    check(case, device, case.random_pages(30))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("new_tokens", [0, 1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_page_selected_is_dense(device: str, dtype: torch.dtype, new_tokens: int, per_head: bool) -> None:
    """Bit for bit, with any number of padding entries in the list."""
    case = Case(Shape(dtype, 128, 16, 2, 4, new_tokens, lengths=(1500, 16, 5, 0), spare_pages=3))
    P = case.shape.capacity
    rows = (*case.q.shape[:-2], case.shape.heads if per_head else case.shape.kv_heads)
    every = torch.arange(P, dtype=torch.int32).expand(*rows, P).contiguous()
    visible = torch.tensor([reference.num_pages(n, 16) for n in case.shape.lengths])
    every[every >= visible.view(-1, *[1] * len(rows))] = -1
    dense = decode(case, device)
    for pages in (every, torch.nn.functional.pad(every, (0, 40), value=-1)):
        for actual, expected in zip(decode(case, device, pages), dense, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_shows_only_where_it_is_read(device: str, dtype: torch.dtype, per_head: bool) -> None:
    """A row that reads a NaN key or value is NaN; the others keep their bits."""
    case = Case(Shape(dtype, lengths=(70, 50), new_tokens=3, page_size=8))
    lists = torch.tensor([[0, 2, 8], [0, 1, 2], [1, 2, 8], [0, 1, -1]], dtype=torch.int32)
    pages = lists[: 4 if per_head else 2].repeat(2, 3, 1, 1)
    pages[1, pages[1] == 8] = -1
    clean = [x.cpu() for x in decode(case, device, pages)]
    page, slot = case.slots(0, range(70))
    case.k_cache[page[69], 0, slot[69], 3] = math.nan  # seen by the last new token only
    case.v_cache[page[20], 1, slot[20]] = math.nan
    case.q[1, 1, 2, 0] = math.nan
    broken = [x.cpu() for x in decode(case, device, pages)]
    exact = reference.sparse_decode(*case.attention, pages)
    for actual, before, expected in zip(broken, clean, exact, strict=True):
        assert_exact(actual.isnan(), expected.isnan())
        assert_same_bits(actual[~expected.isnan()], before[~expected.isnan()])


def test_one_new_token_needs_no_dimension(device: str) -> None:
    case = Case(Shape(lengths=(100, 0, 64), new_tokens=1))
    x, pages = case.on(device), case.random_pages(5).to(device)
    one = x.having(q=x.q[:, 0])
    for a, b in ((None, None), (pages[:, 0], pages)):
        results = ops.sparse_decode(*one.attention, a), ops.sparse_decode(*x.attention, b)
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected[:, 0])


def test_pool_past_2_31_elements(device: str) -> None:
    case = Case(Shape(dtype=torch.float16, lengths=(40, 33), spare_pages=0))
    arguments = (case.page_table.to(device), case.seq_lens.to(device), case.random_pages(2).to(device))
    caches = (case.k_cache, case.v_cache)
    near = ops.sparse_decode(case.q.to(device), *(x.to(device) for x in caches), *arguments)
    far = ops.sparse_decode(place_far_apart(case.q, device), *(place_far_apart(x, device) for x in caches), *arguments)
    for actual, expected in zip(far, near, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_attend_to(device: str, dtype: torch.dtype) -> None:
    """No tokens, no pages, no capacity, no pool: 0 and -inf. No sequences: nothing."""
    case = Case(Shape(dtype, lengths=(40, 33)))
    x = case.on(device)
    cache = (x.k_cache, x.v_cache)
    unselected = torch.full((2, 2, 3), -1, dtype=torch.int32, device=device)
    beyond = torch.full((2, 2, 1), 3, dtype=torch.int32, device=device)
    empty = torch.zeros_like(x.seq_lens)
    for out, lse in (
        ops.sparse_decode(x.q, *cache, x.page_table, empty),
        ops.sparse_decode(x.q, *cache, x.page_table, x.seq_lens, unselected),
        ops.sparse_decode(x.q, *cache, x.page_table, x.seq_lens, unselected[..., :0]),
        ops.sparse_decode(x.q, *cache, x.page_table, x.seq_lens, beyond),
        ops.sparse_decode(x.q, *cache, x.page_table[:, :0], empty),
        ops.sparse_decode(x.q, *(y[:0] for y in cache), x.page_table, empty),
    ):
        assert_same_bits(out, torch.zeros_like(case.q))
        assert_exact(lse, torch.full((2, 4), -math.inf))
    out, lse = ops.sparse_decode(x.q[:0], *cache, x.page_table[:0], x.seq_lens[:0])
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)
