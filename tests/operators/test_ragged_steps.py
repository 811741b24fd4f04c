"""Steps in which sequences differ: in new_lens, which may be 0, in budgets, and in the side of dense_below."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import KINDS, Case, Kind, Shape, assert_accurate, assert_exact, assert_same_bits, shapes
from helpers.steps import assert_same_step, before_step, caches, four_steps, limits_around, on, one_step
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops, reference
from torch import Tensor

# Sequences that are long, short, idle in this step, empty, and of one token.
LENGTHS, NEWS = (700, 37, 333, 0, 1), (3, 1, 0, 0, 1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
MAIN_KINDS = ("minmax", "minmax-8-bit", "mean-std-4-bit")
ALL_BOUNDS = pytest.mark.parametrize("kind", [KINDS[name] for name in MAIN_KINDS], ids=MAIN_KINDS)
REDUCES = ("none", "max", "sum", "soft")


@st.composite
def ragged_shapes(draw: st.DrawFn) -> tuple[Shape, tuple[int, ...]]:
    shape = draw(shapes(any_kind=True))
    T = max(1, shape.new_tokens)
    news = tuple(draw(st.integers(0, min(T, length))) for length in shape.lengths)
    return replace(shape, shared_pages=0), news


@given(ragged_shapes(), st.integers(1, 12), st.sampled_from(REDUCES), st.data())
def test_against_the_reference(
    device: str, drawn: tuple[Shape, tuple[int, ...]], k: int, group_reduce: Any, data: st.DataObject
) -> None:
    shape, news = drawn
    case = Case(shape)
    new_lens = torch.tensor(news, dtype=torch.int32)
    budgets = torch.tensor([data.draw(st.integers(-1, k + 2)) for _ in news], dtype=torch.int32)
    x, lens, limits = case.on(device), new_lens.to(device), budgets.to(device)

    scores = ops.estimate(*x.scoring, shape.page_size, x.k_scales, lens)
    exact = reference.estimate(*case.scoring, shape.page_size, case.k_scales, new_lens)
    assert torch.equal(scores.cpu() == -math.inf, exact == -math.inf)

    forced = (0, min(1, k))
    pages = ops.topk_pages(
        scores, x.seq_lens, shape.page_size, k, shape.kv_heads, group_reduce, *forced, 1.0, lens, limits
    )
    if group_reduce in ("none", "max"):  # sums round in another order, which may swap near ties
        where = (case.seq_lens, shape.page_size, k, shape.kv_heads, group_reduce)
        assert_exact(pages, reference.topk_pages(scores.cpu(), *where, *forced, 1.0, new_lens, budgets))
    assert ((pages >= 0).sum(-1).flatten(1).amax(1).cpu() <= budgets.clamp(forced[1], k)).all()

    out, lse = ops.sparse_decode(*x.attention, pages, None, lens)
    exact_out, exact_lse = reference.sparse_decode(*case.attention, pages.cpu(), None, new_lens)
    assert torch.equal(lse.cpu() == -math.inf, exact_lse == -math.inf)
    assert torch.equal(out.cpu().bool().any(-1), (exact_out != 0).any(-1))
    for b, n in enumerate(news):  # accuracy: the bits of the row without padding, which other tests hold to float64
        row = (slice(b, b + 1), slice(0, n)) if shape.new_tokens else (slice(b, b + n),)
        if n:
            where = (x.page_table[b : b + 1], x.seq_lens[b : b + 1])
            alone = ops.sparse_decode(x.q[row], x.k_cache, x.v_cache, *where, pages[row])
            assert_same_bits(out[row], alone[0])
            assert_same_bits(lse[row], alone[1])


@DTYPES
@ALL_BOUNDS
@pytest.mark.parametrize("dense", [False, True])
def test_a_padded_row_has_the_bits_of_the_row_alone(device: str, dtype: torch.dtype, kind: Kind, dense: bool) -> None:
    shape = Shape(dtype, 128, 16, 2, 4, new_tokens=4, lengths=LENGTHS, kind=kind)
    x = Case(shape).on(device)
    lens = torch.tensor(NEWS, dtype=torch.int32, device=device)
    scores = ops.estimate(*x.scoring, 16, x.k_scales, lens)
    pages = ops.topk_pages(scores, x.seq_lens, 16, 5, 2, "max", 1, 1, 1.0, lens)
    out, lse = ops.sparse_decode(*x.attention, None if dense else pages, None, lens)
    for b, n in enumerate(NEWS):
        row = slice(b, b + 1)
        assert (scores[b, n:] == -math.inf).all()
        assert (pages[b, n:] == -1).all()
        assert (out[b, n:] == 0).all()
        assert (lse[b, n:] == -math.inf).all()
        if n == 0:
            continue
        q, where = x.q[row, :n], (x.page_table[row], x.seq_lens[row])
        alone = ops.estimate(q, x.k_bounds, *where, 16, x.k_scales)
        assert_same_bits(scores[row, :n], alone)
        chosen = ops.topk_pages(alone, x.seq_lens[row], 16, 5, 2, "max", 1, 1)
        assert_same_bits(pages[row, :n], chosen)
        expected = ops.sparse_decode(q, x.k_cache, x.v_cache, *where, None if dense else chosen)
        assert_same_bits(out[row, :n], expected[0])
        assert_same_bits(lse[row, :n], expected[1])


@pytest.mark.parametrize("limited", [False, True], ids=["budgets", "dense_below"])
@given(ragged_shapes(), st.integers(1, 9), st.sampled_from(REDUCES), st.data())
def test_a_step_is_the_four_operators(
    device: str,
    limited: bool,
    drawn: tuple[Shape, tuple[int, ...]],
    num_pages: int,
    group_reduce: Any,
    data: st.DataObject,
) -> None:
    """With dense_below, sequences lie on both sides of it."""
    shape, news = drawn
    budgets = torch.tensor([data.draw(st.integers(0, num_pages)) for _ in news], dtype=torch.int32, device=device)
    assert_same_step(
        before_step(shape, news),
        device,
        num_pages,
        group_reduce=group_reduce,
        budgets=budgets if data.draw(st.booleans()) else None,
        dense_below=data.draw(limits_around(shape.lengths)) if limited else 0,
    )


@given(ragged_shapes(), st.sampled_from(REDUCES), st.integers(0, 1))
def test_a_step_over_every_page(
    device: str, drawn: tuple[Shape, tuple[int, ...]], group_reduce: Any, recent_pages: int
) -> None:
    shape, news = drawn
    assert_same_step(before_step(shape, news), device, 0, group_reduce=group_reduce, recent_pages=recent_pages)


@pytest.mark.parametrize("new_tokens", [0, 1, 4, 8])
@DTYPES
@ALL_BOUNDS
def test_a_short_sequence_has_the_bits_of_dense_attention(
    device: str, kind: Kind, dtype: torch.dtype, new_tokens: int
) -> None:
    """The length with all new tokens decides, and the others are as without dense_below."""
    T = max(1, new_tokens)
    shape = Shape(dtype, 128, 16, 2, 4, new_tokens=new_tokens, lengths=(400, 401, 37, 999, T), kind=kind)
    case = before_step(shape, (T, T, min(T, 2), 1, T))
    every, few, mixed = (
        one_step(on(case, device), **options)
        for options in ({"num_pages": 0}, {"num_pages": 3}, {"num_pages": 3, "dense_below": 400})
    )
    for b, whole in enumerate((True, False, True, False, True)):
        for actual, expected in zip(mixed[:2], (every if whole else few)[:2], strict=True):
            assert_same_bits(actual[b], expected[b])
    assert not torch.equal(mixed[0][0], few[0][0])
    assert mixed[2].shape[-1] == 25
    assert_same_bits(mixed[2][[1, 3]], torch.nn.functional.pad(few[2][[1, 3]], (0, 22), value=-1))
    assert (mixed[2][0] == torch.arange(25, device=device)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ALL_BOUNDS
@pytest.mark.parametrize("group_reduce", ["max", "sum"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_one_launch(device: str, dtype: torch.dtype, kind: Kind, group_reduce: Any, sinks: int) -> None:
    """A single kernel on a GPU: rows that pause, idle rows and budgets, in rows of one split and of many."""
    shape = Shape(dtype, 128, 16, 8, 4, lengths=(9000, 2100, 333, 0, 1, 4096), kind=kind)
    budgets = torch.tensor([64, 300, 5, 1, 0, 17], dtype=torch.int32, device=device)
    case = before_step(shape, (1, 1, 0, 0, 1, 1))
    for limits, dense_below in ((None, 0), (budgets, 0), (budgets, 3000)):
        options = {"budgets": limits, "dense_below": dense_below}
        assert_same_step(case, device, 128, group_reduce=group_reduce, sink_pages=sinks, **options)


@pytest.mark.parametrize("new_tokens", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"num_pages": 2}, {"num_pages": 2, "dense_below": 40}, {"num_pages": 0}], ids=str)
def test_idle_rows_are_neither_written_nor_read(
    device: str, options: dict[str, Any], new_tokens: int, dtype: torch.dtype
) -> None:
    """Rows of length 0, which a padded CUDA graph has, need no new_lens."""
    T = max(1, new_tokens)
    shape = Shape(dtype, 64, 16, 2, 2, new_tokens=new_tokens, lengths=(50, T, 37), kind=KINDS["minmax-8-bit"])
    x = on(before_step(shape), device)
    x.seq_lens[1] = x.start_lens[1] = 0
    before = [t.clone() for t in caches(x)]
    out, lse, pages = one_step(x, **options)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    assert (pages[1] == -1).all()
    assert out[[0, 2]].isfinite().all()
    own = x.page_table[1, 0].long()
    for after, old in zip(caches(x), before, strict=True):
        assert_same_bits(after[own], old[own])


@DTYPES
def test_the_same_budget_for_all_is_that_number_of_pages(device: str, dtype: torch.dtype) -> None:
    shape = Shape(dtype, 64, 16, 2, 2, lengths=(700, 90, 20), kind=KINDS["minmax-8-bit"])
    budgets = torch.full((3,), 4, dtype=torch.int32, device=device)
    x, y = on(before_step(shape), device), on(before_step(shape), device)
    few, wide = one_step(x, 4), one_step(y, 9, budgets=budgets)
    assert_same_bits(wide[0], few[0])
    assert_same_bits(wide[1], few[1])
    assert_same_bits(wide[2][..., :4].contiguous(), few[2])
    assert (wide[2][..., 4:] == -1).all()


def test_a_budget_for_each_against_float64(device: str) -> None:
    shape = Shape(torch.bfloat16, 64, 16, 2, 2, lengths=(700, 300, 20))
    budgets = torch.tensor([3, 12, 1], dtype=torch.int32)
    case = before_step(shape)
    x = on(case, device)
    out, _, pages = one_step(x, 12, budgets=budgets.to(device))
    assert (pages >= 0).sum(-1).cpu().tolist() == [[3, 3], [12, 12], [1, 1]]
    full = Case(shape)
    exact, _ = reference.sparse_decode(*full.attention, pages.cpu())
    plain, _ = torch_baseline.in_several_orders(torch_baseline.sparse_decode, *full.attention, pages.cpu())
    assert_accurate(out, exact, plain, shape.dtype)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("new_lens", [1, 5], r"new_lens must be 0 to 4 \(T\), got 5 for sequence 1"),
        ("new_lens", [-1, 2], r"new_lens must be 0 to 4 \(T\), got -1 for sequence 0"),
    ],
)
def test_wrong_values(device: str, monkeypatch: Any, name: str, value: list[int], message: str) -> None:
    if device == "cuda":
        monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    shape = Shape(torch.float32, 64, 16, 2, 2, new_tokens=4, lengths=(50, 37))
    x = on(before_step(shape, (1, 2)), device)
    wrong = torch.tensor(value, dtype=torch.int32, device=device)
    calls = (
        lambda: ops.estimate(*x.scoring, 16, None, wrong),
        lambda: ops.topk_pages(torch.zeros(2, 4, 4, 4, device=device), x.seq_lens, 16, 2, 2, new_lens=wrong),
        lambda: ops.sparse_decode(*x.attention, None, None, wrong),
        lambda: one_step(x.having(**{name: wrong}), 2),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_lengths_that_contradict_the_new_tokens(device: str, monkeypatch: Any) -> None:
    if device == "cuda":
        monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    x = on(before_step(Shape(torch.float32, 64, 16, 2, 2, new_tokens=4, lengths=(50, 37)), (1, 2)), device)
    x.seq_lens[1] += 1
    with pytest.raises(RuntimeError, match=r"seq_lens must be start_lens \+ new_lens, 35 \+ 2 for sequence 1, got 38"):
        one_step(x, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("new_lens", torch.zeros(2), "new_lens must be int32, got Float"),
        ("new_lens", torch.zeros(3, dtype=torch.int32), r"new_lens must have shape \[B\] with 2 in dimension 0"),
        ("budgets", torch.zeros(2, dtype=torch.int64), "budgets must be int32, got Long"),
        ("budgets", torch.zeros(2, 1, dtype=torch.int32), r"budgets must have shape \[B\], got \[2, 1\]"),
    ],
)
def test_wrong_tensors(device: str, name: str, value: Tensor, message: str) -> None:
    x = on(before_step(Shape(torch.float32, 64, 16, 2, 2, lengths=(50, 37)), (1, 1)), device)
    with pytest.raises(RuntimeError, match=message):
        one_step(x.having(new_lens=value.to(device)), 2) if name == "new_lens" else one_step(
            x, 2, budgets=value.to(device)
        )


@pytest.mark.gpu
@ALL_BOUNDS
@pytest.mark.parametrize(("num_pages", "dense_below"), [(16, 0), (16, 600), (0, 0)])
def test_graph_replays_with_idle_rows_and_budgets(num_pages: int, dense_below: int, kind: Kind) -> None:
    """One graph serves batches of any composition: who is idle, lengths and budgets change between replays."""
    device = "cuda"
    shape = Shape(torch.bfloat16, 128, 16, 8, 4, lengths=(900, 500, 700), kind=kind)
    case = before_step(shape)
    x = on(case, device)
    budgets = torch.full((3,), 8, dtype=torch.int32, device=device)
    options = {"budgets": budgets if num_pages else None, "dense_below": dense_below}
    one_step(x, num_pages, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = one_step(x, num_pages, **options)
    for lengths, limits in (
        ((900, 500, 700), (16, 3, 8)),
        ((900, 0, 700), (5, 8, 9)),
        ((0, 500, 0), (1, 1, 1)),
        ((600, 20, 601), (2, 2, 2)),
        ((601, 500, 600), (16, 16, 3)),
    ):
        fresh = on(case, device)
        for t, length in ((x, lengths), (fresh, lengths)):
            lens = torch.tensor(length, dtype=torch.int32, device=device)
            t.seq_lens.copy_(lens)
            t.start_lens.copy_((lens - 1).clamp(min=0))
        for a, b in zip(caches(x), caches(fresh), strict=True):
            a.copy_(b)
        budgets.copy_(torch.tensor(limits, dtype=torch.int32))
        graph.replay()
        expected = four_steps(fresh.having(new_lens=(fresh.seq_lens > 0).int()), num_pages, **options)
        for actual, value in zip(results, expected, strict=True):
            assert_same_bits(actual, value)
