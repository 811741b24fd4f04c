"""estimate: the scores of pages against the reference, by the error rule."""

import math

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import (
    DTYPES,
    HEAD_DIMS,
    KINDS,
    PAGE_SIZES,
    Case,
    Shape,
    assert_accurate,
    assert_exact,
    assert_same_bits,
    place_far_apart,
    shapes,
)
from hypothesis import given
from quest_ops import ops, reference


def check(case: Case, device: str) -> None:
    S = case.shape.page_size
    x = case.on(device)
    actual = ops.estimate(*x.scoring, S, x.k_scales)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    (like,) = torch_baseline.in_several_orders(torch_baseline.estimate, *case.scoring, S, case.k_scales)
    assert_accurate(actual, reference.estimate(*case.scoring, S, case.k_scales), like, case.shape.dtype)


@given(shapes())
def test_scores_meet_the_reference(device: str, shape: Shape) -> None:
    check(Case(shape), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("kind", ["minmax", "mean-std-4-bit"])
def test_every_kind_of_page(device: str, dtype: torch.dtype, head_dim: int, page_size: int, kind: str) -> None:
    lengths = (5 * page_size, 3 * page_size + 1, 0, 1, 6 * page_size - 1)
    shape = Shape(dtype, head_dim, page_size, 2, 3, new_tokens=2, lengths=lengths, kind=KINDS[kind], seed=1)
    check(Case(shape), device)


@pytest.mark.parametrize("group", [1, 4, 7, 16, 20, 32])
@pytest.mark.parametrize("new_tokens", [0, 8])
@pytest.mark.parametrize("kind", ["minmax", "mean-std-4-bit"])
def test_many_pages(device: str, group: int, new_tokens: int, kind: str) -> None:
    lengths = (8 * 1000 + 3, 8 * 517)
    shape = Shape(torch.bfloat16, 128, 8, 1, group, new_tokens, lengths, spare_pages=9, kind=KINDS[kind], seed=2)
    check(Case(shape), device)


def test_nan_shows_where_it_is(device: str) -> None:
    case = Case(Shape(lengths=(100, 64), page_size=8, new_tokens=3))
    case.k_bounds[case.page_table[0, 2], 1, :, 17] = math.nan
    case.q[1, 1, 3, 5] = math.nan
    x = case.on(device)
    scores = ops.estimate(*x.scoring, 8).cpu()
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[0, :, 2:, 2] = True
    expected[1, 1, 3, :8] = True
    assert_exact(scores.isnan(), expected)


def test_one_new_token_needs_no_dimension(device: str) -> None:
    case = Case(Shape(lengths=(100, 0, 64), new_tokens=1))
    x = case.on(device)
    many = ops.estimate(*x.scoring, 16)
    assert_same_bits(ops.estimate(x.q[:, 0], x.k_bounds, x.page_table, x.seq_lens, 16), many[:, 0])


def test_pool_past_2_31_elements(device: str) -> None:
    case = Case(Shape(dtype=torch.float16, lengths=(40, 33), spare_pages=0))
    arguments = (case.page_table.to(device), case.seq_lens.to(device), 16)
    near = ops.estimate(case.q.to(device), case.k_bounds.to(device), *arguments)
    far = ops.estimate(place_far_apart(case.q, device), place_far_apart(case.k_bounds, device), *arguments)
    assert_same_bits(far, near)


def test_nothing_to_do(device: str) -> None:
    case = Case(Shape(lengths=(20, 3)))
    x = case.on(device)
    assert ops.estimate(x.q[:0], x.k_bounds, x.page_table[:0], x.seq_lens[:0], 16).shape == (0, 4, 2 + 1)
    empty = torch.zeros_like(x.seq_lens)
    assert ops.estimate(x.q, x.k_bounds, x.page_table[:, :0], empty, 16).shape == (2, 4, 0)
    assert (ops.estimate(x.q, x.k_bounds[:0], x.page_table, empty, 16) == -math.inf).all()
