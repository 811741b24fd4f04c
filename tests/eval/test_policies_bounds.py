"""Mean and standard deviation as page bounds: against float64, through the operator, and what is left alone."""

import math

import pytest
import torch
from helpers.operator_cases import Case, Shape
from quest_ops import empty_bounds, estimate, page_view_bhld
from quest_ops.bounds import update_mean_std_bounds

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected(case, c):
    """float64 bounds of every page in use, NaN elsewhere."""
    S = case.shape.page_size
    bounds = torch.full(case.k_bounds.shape, math.nan, dtype=torch.float64)
    for b, keys in enumerate(case.keys):
        for page, part in enumerate(keys.double().split(S)):
            mean, std = part.mean(0), part.std(0, correction=0)
            bounds[case.page_table[b, page].long()] = torch.stack([mean - c * std, mean + c * std], 1)
    return bounds


def update(case, bounds, device, seq_lens=None, **options):
    seq_lens = case.seq_lens if seq_lens is None else seq_lens
    cache, table = case.k_cache.to(device), case.page_table.to(device)
    bounds = bounds.to(device)
    update_mean_std_bounds(cache, bounds, table, seq_lens.to(device), **options)
    return bounds.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [0.0, 1.0, 2.5])
def test_bounds_are_those_of_float64(device, dtype, c):
    case = Case(Shape(dtype=dtype, lengths=(37, 16, 1, 130), page_size=16, shared_pages=1))
    bounds = update(case, torch.full_like(case.k_bounds, math.nan), device, c=c)
    # The rounding of the result, and for the mean and the deviation some of float32's.
    rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(bounds.double(), expected(case, c), rtol=rounding, atol=rounding, equal_nan=True)


def test_a_key_alone_is_both_bounds(device):
    case = Case(Shape(lengths=(17,)))
    bounds = update(case, torch.zeros_like(case.k_bounds), device)
    page = int(case.page_table[0, 1])
    torch.testing.assert_close(bounds[page, :, 0], case.keys[0][16])
    torch.testing.assert_close(bounds[page, :, 1], case.keys[0][16])


@pytest.mark.parametrize("num_new", [1, 2, 16, 17, 40])
def test_only_the_pages_of_new_tokens_are_written(device, num_new):
    case = Case(Shape(lengths=(64, 49, 65)))
    bounds = update(case, torch.full_like(case.k_bounds, math.nan), device, num_new=num_new)
    whole = update(case, torch.full_like(case.k_bounds, math.nan), device)
    for b, length in enumerate(case.shape.lengths):
        first = max(0, length - num_new) // 16
        # Beyond what is asked for, at most one page before it is written, with its own bounds.
        for page in range((length + 15) // 16):
            physical = int(case.page_table[b, page])
            if page >= first:
                assert torch.equal(bounds[physical], whole[physical])
            elif page < first - 1:
                assert bounds[physical].isnan().all()


def test_the_operator_estimates_from_them(device):
    case = Case(Shape(lengths=(37, 80), kv_heads=2, group=3))
    bounds = update(case, torch.full_like(case.k_bounds, math.nan), device, c=1.5).to(device)
    table, lens = case.page_table.to(device), case.seq_lens.to(device)
    scores = estimate(case.q.to(device), bounds, table, lens, 16).cpu()
    for b, keys in enumerate(case.keys):
        for page, part in enumerate(keys.double().split(16)):
            part = part.repeat_interleave(3, 1)
            q = case.q[b].double()
            wanted = (q * part.mean(0)).sum(-1) + 1.5 * (q.abs() * part.std(0, correction=0)).sum(-1)
            torch.testing.assert_close(scores[b, :, page].double(), wanted, rtol=1e-5, atol=1e-4)


def test_views_of_contiguous_caches_will_do(device):
    k = torch.randn(2, 3, 64, 64, device=device)
    view = page_view_bhld(k, torch.zeros_like(k), 16)
    bounds, lens = empty_bounds(view), torch.tensor([64, 50], dtype=torch.int32, device=device)
    update_mean_std_bounds(view.k_cache, bounds, view.page_table, lens)
    written = bounds[view.page_table.long()]  # [B, P, Hkv, 2, D]
    std, mean = torch.std_mean(k[0].unflatten(1, (4, 16)), 2, correction=0)
    torch.testing.assert_close(written[0, :, :, 0].transpose(0, 1), mean - std)
    torch.testing.assert_close(written[1, 3, :, 1], k[1, :, 48:50].mean(1) + k[1, :, 48:50].std(1, correction=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_new": 0}, "num_new must be at least 1 or None, got 0"), ({"c": -1.0}, "c must be at least 0, got -1.0")],
)
def test_bad_numbers_are_errors(options, message):
    case = Case(Shape())
    with pytest.raises(ValueError, match=message):
        update(case, case.k_bounds.clone(), "cpu", **options)


def test_bounds_of_another_shape_are_an_error():
    case = Case(Shape())
    with pytest.raises(ValueError, match=r"k_bounds must have shape \[.*, 2, 2, 64\] to go with k_cache, got"):
        update(case, case.k_bounds[:, :1], "cpu")
