"""Scores of -inf and +inf, by keys with an infinite component. The float64 reference is the judge.

A score is ``scale * (q . k)`` in IEEE arithmetic, so an infinite dot product and a scale of 0 make NaN. Then:

- A token that scores -inf has no weight. A row in which every visible token does is an empty row: out 0, lse -inf.
- A token that scores +inf, and none NaN, makes out NaN and lse +inf.
- A token that scores NaN makes both NaN.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import DTYPES, Case, Shape, assert_accurate, assert_exact, assert_same_bits
from quest_ops import ops, reference
from torch import Tensor

INF = math.inf
COMPONENT = 5  # the infinite component of a key; q is positive there
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NEW_TOKENS = pytest.mark.parametrize("new_tokens", [0, 1, 5])


def with_infinite_keys(shape: Shape, places: dict[int, list[range]], infinity: float = -INF) -> Case:
    """A case in which the keys of these tokens of a sequence have an infinite component."""
    case = Case(shape)
    case.q[..., COMPONENT] = case.q[..., COMPONENT].abs() + 0.5
    for b, ranges in places.items():
        for tokens in ranges:
            page, slot = case.slots(b, tokens)
            case.k_cache[page, :, slot, COMPONENT] = infinity
    paging = (case.page_table, case.seq_lens)
    return case.having(k_bounds=reference.update_bounds(case.k_cache, case.k_bounds, *paging))


def page_lists(case: Case) -> Iterator[Tensor | None]:
    """None for dense attention, every page, some pages and some pages of each head."""
    P = case.shape.capacity
    yield None
    every = torch.arange(P, dtype=torch.int32).expand(*case.q.shape[:-2], case.shape.kv_heads, P)
    visible = torch.tensor([reference.num_pages(n, case.shape.page_size) for n in case.shape.lengths])
    yield every.masked_fill(every >= visible.view(-1, *[1] * (every.dim() - 1)), -1)
    yield case.random_pages(P // 2, shuffled=True)
    yield case.random_pages(P // 3, per_head=True)


def check(case: Case, device: str, pages: Tensor | None, scale: float | None = None) -> Tensor:
    """The result is the reference's, and where that is an empty row, that of an empty row to the bit. Returns lse."""
    if pages is not None:
        case = case.poisoned(pages)
    x = case.on(device)
    arguments = (*case.attention, pages, scale)
    out, lse = (y.cpu() for y in ops.sparse_decode(*x.attention, None if pages is None else pages.to(device), scale))
    exact = reference.sparse_decode(*arguments)
    likes = torch_baseline.in_several_orders(torch_baseline.sparse_decode, *arguments)
    empty = exact[1] == -INF
    assert_exact(lse == -INF, empty)
    assert_same_bits(out[empty], torch.zeros_like(out[empty]))
    for actual, expected, like in zip((out, lse), exact, likes, strict=True):
        assert_accurate(actual[~empty], expected[~empty], like[:, ~empty], case.shape.dtype)
    return lse


@EVERY_DTYPE
@NEW_TOKENS
def test_a_row_that_scores_minus_infinity_throughout_is_empty(device: str, dtype: torch.dtype, new_tokens: int) -> None:
    lengths = (1700, 700, 128, 5, 90)
    shape = Shape(dtype, page_size=16, kv_heads=2, group=3, new_tokens=new_tokens, lengths=lengths)
    case = with_infinite_keys(shape, {b: [range(n)] for b, n in enumerate(lengths[:4])})
    for pages in page_lists(case):
        lse = check(case, device, pages)
        assert (lse[:4] == -INF).all()
    assert (check(case, device, None)[4] > -INF).all()


@EVERY_DTYPE
def test_values_of_a_row_without_weights_do_not_matter(device: str, dtype: torch.dtype) -> None:
    case = with_infinite_keys(Shape(dtype, lengths=(1300, 40)), {0: [range(1300)], 1: [range(40)]})
    page, slot = case.slots(0, range(1300))
    case.v_cache[page[::7], :, slot[::7]] = math.nan
    case.v_cache[page[3::7], :, slot[3::7]] = INF
    case.v_cache[page[5::7], :, slot[5::7]] = torch.finfo(dtype).max  # their sum overflows
    for pages in (None, case.random_pages(30)):
        assert (check(case, device, pages) == -INF).all()


@EVERY_DTYPE
@NEW_TOKENS
def test_minus_infinity_weighs_nothing_beside_other_scores(device: str, dtype: torch.dtype, new_tokens: int) -> None:
    """Whole splits score -inf at the start, in the middle, at the end, everywhere but in one token, and every other."""
    lengths = (3000, 3000, 3000, 3000, 300)
    places = {
        0: [range(1500)],
        1: [range(200, 2600)],
        2: [range(1100, 3000)],
        3: [range(1029), range(1030, 3000)],
        4: [range(n, n + 1) for n in range(0, 300, 2)],
    }
    shape = Shape(dtype, page_size=16, kv_heads=1, group=4, new_tokens=new_tokens, lengths=lengths)
    case = with_infinite_keys(shape, places)
    for pages in page_lists(case):
        check(case, device, pages)
    assert (check(case, device, None) > -INF).all()


@EVERY_DTYPE
def test_each_new_token_has_its_own_prefix(device: str, dtype: torch.dtype) -> None:
    """Rows are empty up to the first new token that sees a finite score."""
    shape = Shape(dtype, new_tokens=8, lengths=(260, 8, 5))
    case = with_infinite_keys(shape, {0: [range(257)], 1: [range(6), range(7, 8)], 2: [range(3)]})
    for pages in page_lists(case):
        check(case, device, pages)
    lse = check(case, device, None)
    for b, first in enumerate((5, 6, 6)):
        assert (lse[b, :first] == -INF).all()
        assert (lse[b, first:] > -INF).all()


@EVERY_DTYPE
@pytest.mark.parametrize("scale", [0.125, 0.0, -0.125])
@pytest.mark.parametrize("infinity", [-INF, INF])
def test_the_sign_of_the_scale(device: str, dtype: torch.dtype, infinity: float, scale: float) -> None:
    """A negative scale turns -inf round; 0 makes it NaN. Sequence 0 scores so throughout, 1 in part and 2 nowhere."""
    shape = Shape(dtype, new_tokens=2, lengths=(700, 1100, 30))
    case = with_infinite_keys(shape, {0: [range(700)], 1: [range(600)]}, infinity)
    lse = check(case, device, None, scale)
    if infinity * scale == -INF:
        assert (lse[0] == -INF).all()
        assert lse[1:].isfinite().all()
    elif infinity * scale == INF:
        assert (lse[:2] == INF).all()
        assert lse[2].isfinite().all()
    else:
        assert lse[:2].isnan().all()
        assert lse[2].isfinite().all()
    check(case, device, case.random_pages(shape.capacity // 2), scale)


@EVERY_DTYPE
@pytest.mark.parametrize("group_reduce", ["none", "max", "sum", "soft"])
@pytest.mark.parametrize("new_tokens", [0, 1, 3])
def test_decode_step(device: str, dtype: torch.dtype, new_tokens: int, group_reduce: str) -> None:
    """The new keys are infinite too. Sequence 0 scores -inf throughout, 1 but for one page, 2 nowhere else."""
    T, lengths = max(1, new_tokens), (2003, 2003, 2003, 4)
    shape = Shape(dtype, page_size=16, kv_heads=2, group=2, new_tokens=new_tokens, lengths=lengths)
    places = {0: [range(2003)], 1: [range(160), range(176, 2003)], 2: [range(2003 - T, 2003)], 3: [range(4)]}
    case = with_infinite_keys(shape, places)
    x = case.on(device)
    k, v = (torch.empty(4, T, 2, 64, dtype=dtype) for _ in "kv")
    for b, n in enumerate(lengths):
        page, slot = case.slots(b, range(n - T, n))
        k[b], v[b] = case.k_cache[page, :, slot], case.v_cache[page, :, slot]
        x.k_cache[page, :, slot] = x.v_cache[page, :, slot] = math.nan
    caches = (x.k_cache, x.v_cache, x.k_bounds)
    step = (x.page_table, x.seq_lens - T, x.seq_lens, 40, group_reduce)
    out, lse, pages = ops.decode_step(x.q, k.to(device), v.to(device), *caches, *step)
    for actual, expected in zip((out, lse), ops.sparse_decode(*x.attention, pages), strict=True):
        assert_same_bits(actual, expected)
    assert_same_bits(x.k_cache.cpu(), case.k_cache)
    empty = (reference.sparse_decode(*case.attention, pages.cpu())[1] == -INF).to(device)
    assert empty[[0, 3]].all()
    assert_exact(lse == -INF, empty)
    assert_same_bits(out[empty], torch.zeros_like(out[empty]))
