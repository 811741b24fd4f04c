"""Page bounds of 8 and 4 bits: the specified bytes and scales, valid bounds, nearly the same selection."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    UNREAD_BYTE,
    Case,
    Kind,
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

SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, "smallest", "largest")


SCALED = {name: kind for name, kind in KINDS.items() if kind.scaled}
MIN_MAX = {name: kind for name, kind in SCALED.items() if kind.std_factor is None}
kinds = st.sampled_from(list(SCALED.values()))
min_max_kinds = st.sampled_from(list(MIN_MAX.values()))
all_kinds = pytest.mark.parametrize("kind", SCALED.values(), ids=SCALED)


def update(x: Case, bounds: tuple[Tensor, Tensor], first_token: Tensor | None = None) -> None:
    where = (x.k_cache, bounds[0], x.page_table, x.seq_lens)
    ops.update_bounds(*where, first_token, bounds[1], x.shape.kind.std_factor)


def empty_like(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Unwritten bounds and scales, placed as the shape says."""
    layout = LAYOUTS[case.shape.layouts[3]]
    return (
        place(torch.full_like(case.k_bounds, UNREAD_BYTE), layout, device),
        place(torch.full_like(case.k_scales, math.nan), layout, device),
    )


def assert_bounds(actual: tuple[Tensor, Tensor], case: Case) -> None:
    """Bounds and scales are as specified, and no bit beside them has changed."""
    layout = LAYOUTS[case.shape.layouts[3]]
    for memory, expected in zip(actual, (case.k_bounds, case.k_scales), strict=True):
        assert_same_bits(memory._base, place(expected, layout, "cpu")._base)


def with_keys(shape: Shape, value: float | str) -> Case:
    """The case with a given number in all keys of some pages and in a few keys of others."""
    case = Case(shape)
    info = torch.finfo(shape.dtype)
    value = {"smallest": info.smallest_normal * info.eps, "largest": info.max}.get(value, value)
    some = torch.rand(case.k_cache.shape, generator=case.random) < 0.02
    some[::3] = True
    case.k_cache[1::3] *= 2.0**-9
    case.k_cache = case.k_cache.where(case.k_cache.isnan() | ~some, value)
    case.k_bounds.fill_(UNREAD_BYTE)
    case.renew_bounds()
    return case


@given(shapes(), kinds)
def test_update_bounds_gives_the_specified_bits(device: str, shape: Shape, kind: Kind) -> None:
    case = Case(replace(shape, kind=kind))
    x, bounds = case.on(device), empty_like(case, device)
    update(x, bounds)
    assert_bounds(bounds, case)


@given(shapes(max_shared_pages=0), kinds, st.lists(st.integers(0, 1400), min_size=4, max_size=4))
def test_pages_before_the_first_token_are_left_alone(device: str, shape: Shape, kind: Kind, first: list[int]) -> None:
    case = Case(replace(shape, kind=kind))
    x, bounds = case.on(device), empty_like(case, device)
    first_token = torch.tensor(first[: len(shape.lengths)]).int()
    expected = reference.update_scaled_bounds(
        case.k_cache, *(b.cpu() for b in bounds), case.page_table, case.seq_lens, first_token, kind.std_factor
    )
    update(x, bounds, first_token.to(device))
    assert_bounds(bounds, case.having(k_bounds=expected[0], k_scales=expected[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", SPECIAL)
@all_kinds
def test_extreme_keys(device: str, dtype: torch.dtype, value: float | str, kind: Kind) -> None:
    """Bits as specified: NaN and infinite keys show, and zeros stay zeros."""
    case = with_keys(Shape(dtype, lengths=(70, 33), page_size=8, kind=kind, seed=3), value)
    x, bounds = case.on(device), empty_like(case, device)
    update(x, bounds)
    assert_bounds(bounds, case)
    if value == "largest" and kind.std_factor is not None:
        return  # squares of such keys overflow
    scores = ops.estimate(x.q, bounds[0], x.page_table, x.seq_lens, 8, bounds[1]).cpu()
    for b, length in enumerate(case.shape.lengths):
        for page in range(reference.num_pages(length, 8)):
            keys = case.k_cache[case.page_table[b, page], :, : length - page * 8].float()
            faulty = ~keys.isfinite().flatten(1).all(1)  # [Hkv]
            assert_exact(scores[b, :, page].isnan(), faulty.repeat_interleave(2))
            zero = (keys == 0).flatten(1).all(1).repeat_interleave(2)
            assert (scores[b, zero, page] == 0).all()


@given(shapes(max_shared_pages=0, max_new_tokens=0), min_max_kinds)
def test_rounding_is_outward_exactly(device: str, shape: Shape, kind: Kind) -> None:
    """Against the keys themselves, in float64, which holds the products exactly."""
    case = Case(replace(shape, kind=kind))
    x, (k_bounds, k_scales) = case.on(device), empty_like(case, device)
    update(x, (k_bounds, k_scales))
    bounds = reference.dequantize(k_bounds.cpu(), k_scales.cpu())
    for b, keys in enumerate(case.keys):
        for page, tokens in enumerate(keys.double().split(shape.page_size) if len(keys) else ()):
            lower, upper = bounds[case.page_table[b, page]].unbind(1)
            assert (lower <= tokens).all()
            assert (tokens <= upper).all()


@given(shapes(max_shared_pages=0), kinds, st.lists(st.integers(0, 70), min_size=1, max_size=8))
def test_appends_add_up(device: str, shape: Shape, kind: Kind, steps: list[int]) -> None:
    """Many appends into pages of garbage equal a single pass over all tokens."""
    total = sum(steps)
    case = Case(replace(shape, kind=kind, lengths=tuple(total for _ in shape.lengths[:2])))
    x, bounds = case.on(device), empty_like(case, device)
    x.k_cache.fill_(math.nan), x.v_cache.fill_(math.nan)
    done = 0
    for T in steps:
        k, v = (torch.stack([x[done : done + T] for x in tokens]).to(device) for tokens in (case.keys, case.values))
        before = torch.full((len(k),), done, dtype=torch.int32, device=device)
        where = (x.k_cache, x.v_cache, bounds[0], x.page_table, before)
        ops.append_kv(k, v, *where, k_scales=bounds[1], std_factor=kind.std_factor)
        done += T
    assert_same_bits(x.k_cache, case.k_cache)
    assert_bounds(bounds, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_page_written_anew_forgets_what_it_held(device: str, dtype: torch.dtype) -> None:
    """The scale shrinks when large keys are overwritten after a roll-back."""
    x = Case(Shape(dtype, lengths=(40,), kind=KINDS["minmax-8-bit"])).on(device)
    before = torch.tensor([20], dtype=torch.int32, device=device)
    k = torch.randn(1, 20, 2, 64, device=device).to(dtype)
    results = []
    for factor in (1, 100, 1):
        caches = (x.k_cache, x.v_cache, x.k_bounds)
        ops.append_kv(k * factor, k, *caches, x.page_table, before, k_scales=x.k_scales)
        results.append((x.k_bounds.clone(), x.k_scales.clone()))
    assert_same_bits(results[2][0], results[0][0])
    assert_same_bits(results[2][1], results[0][1])
    page = x.page_table[0, 2].item()
    assert (results[1][1][page] > 10 * results[0][1][page]).all()


@given(shapes(), kinds)
def test_scores_meet_the_reference(device: str, shape: Shape, kind: Kind) -> None:
    case = Case(replace(shape, kind=kind))
    x, S = case.on(device), shape.page_size
    actual = ops.estimate(*x.scoring, S, x.k_scales)
    assert actual.dtype == torch.float32
    (like,) = torch_baseline.in_several_orders(torch_baseline.estimate, *case.scoring, S, case.k_scales)
    assert_accurate(actual, reference.estimate(*case.scoring, S, case.k_scales), like, shape.dtype)


@given(shapes(max_new_tokens=0), min_max_kinds)
def test_scores_bound_every_key(device: str, shape: Shape, kind: Kind) -> None:
    """A score is at least q.k for each key of the page, up to the rounding of a dot product."""
    case = Case(replace(shape, kind=kind))
    x = case.on(device)
    scores = ops.estimate(*x.scoring, shape.page_size, x.k_scales).cpu().double()
    for b, keys in enumerate(case.keys):
        if not len(keys):
            continue
        q = case.q[b].double()
        each = torch.einsum("hd,nhd->hn", q, keys.double().repeat_interleave(shape.group, 1))
        size = torch.einsum("hd,nhd->hn", q.abs(), keys.double().abs().repeat_interleave(shape.group, 1))
        bound = scores[b].repeat_interleave(shape.page_size, 1)[:, : len(keys)]
        assert (each <= bound + 2 * torch.finfo(shape.dtype).eps * size).all()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize(("bits", "least"), [("8", 0.95), ("4", 0.6)])
@pytest.mark.parametrize("of", ["minmax", "mean-std"])
def test_the_selection_is_nearly_that_of_16_bits(
    device: str, head_dim: int, page_size: int, bits: str, least: float, of: str
) -> None:
    shape = Shape(torch.bfloat16, head_dim, page_size, 2, 4, lengths=(300 * page_size,) * 2, seed=6)
    lists = []
    for name in (of, f"{of}-{bits}-bit"):
        kind = KINDS[name]._replace(std_factor=KINDS[of].std_factor)
        x = Case(replace(shape, kind=kind)).on(device)
        scores = ops.estimate(*x.scoring, page_size, x.k_scales)
        lists.append(ops.topk_pages(scores, x.seq_lens, page_size, 64, 2).cpu())
    kept = (lists[0][..., :, None] == lists[1][..., None, :]).any(-1)
    assert kept.float().mean() >= least


def test_scales_may_have_any_strides(device: str) -> None:
    """With scales laid out by heads, and far apart in memory."""
    x = Case(Shape(lengths=(100, 64, 7), kind=KINDS["minmax-8-bit"])).on(device)
    memory = torch.full((2, len(x.k_scales), 3), math.nan, device=device)
    scales = memory[..., 1].T
    bounds = torch.full_like(x.k_bounds, UNREAD_BYTE)
    ops.update_bounds(x.k_cache, bounds, x.page_table, x.seq_lens, k_scales=scales)
    assert_same_bits(scales, x.k_scales)
    assert_same_bits(bounds, x.k_bounds)
    assert memory[..., [0, 2]].isnan().all()
    assert_same_bits(ops.estimate(*x.scoring, 16, scales), ops.estimate(*x.scoring, 16, x.k_scales))
    rows = torch.tensor([0, 1], device=device)
    k = torch.randn(2, 1, 2, 64, device=device)
    before = (x.page_table[rows], x.seq_lens[rows] - 1)
    ops.append_kv(k, k, x.k_cache, x.v_cache, x.k_bounds, *before, k_scales=x.k_scales)
    ops.append_kv(k, k, x.k_cache, x.v_cache, bounds, *before, k_scales=scales)
    assert_same_bits(scales, x.k_scales)
    assert_same_bits(bounds, x.k_bounds)
    assert memory[..., [0, 2]].isnan().all()


def test_pool_past_2_31_elements(device: str) -> None:
    case = Case(Shape(dtype=torch.float16, lengths=(40, 33), spare_pages=0, kind=KINDS["minmax-8-bit"]))
    near = case.on(device)
    k_cache, k_bounds, k_scales = (place_far_apart(t, device) for t in (case.k_cache, case.k_bounds, case.k_scales))
    rest = (near.page_table, near.seq_lens)
    assert_same_bits(
        ops.estimate(near.q, k_bounds, *rest, 16, k_scales), ops.estimate(*near.scoring, 16, near.k_scales)
    )
    k_bounds.fill_(UNREAD_BYTE), k_scales.fill_(math.nan)
    ops.update_bounds(k_cache, k_bounds, *rest, k_scales=k_scales)
    assert_same_bits(k_bounds, case.k_bounds)
    assert_same_bits(k_scales, case.k_scales)


def test_nothing_to_do(device: str) -> None:
    x = Case(Shape(lengths=(20, 3), kind=KINDS["minmax-8-bit"])).on(device)
    before = (x.k_bounds._base.clone(), x.k_scales._base.clone())
    none = torch.zeros_like(x.seq_lens)
    ops.update_bounds(x.k_cache, x.k_bounds, x.page_table, none, k_scales=x.k_scales)
    k = torch.empty(2, 0, 2, 64, device=device)
    ops.append_kv(k, k, x.k_cache, x.v_cache, x.k_bounds, x.page_table, x.seq_lens, k_scales=x.k_scales)
    assert_same_bits(x.k_bounds._base, before[0])
    assert_same_bits(x.k_scales._base, before[1])
    scores = ops.estimate(x.q, x.k_bounds[:0], x.page_table, none, 16, x.k_scales[:0])
    assert (scores == -math.inf).all()
