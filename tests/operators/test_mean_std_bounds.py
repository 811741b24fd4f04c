"""Mean and standard deviation as page bounds, against float64. Other tests hold them to the specified bits."""

import math

import pytest
import torch
from helpers.operator_cases import DTYPES, Case, Kind, Shape
from quest_ops import ops


def expected(case, factor):
    """float64 bounds of every page in use, NaN elsewhere."""
    bounds = torch.full(case.k_bounds.shape, math.nan, dtype=torch.float64)
    for b, keys in enumerate(case.keys):
        for page, part in enumerate(keys.double().split(case.shape.page_size)):
            mean, std = part.mean(0), part.std(0, correction=0)
            bounds[case.page_table[b, page].long()] = torch.stack([mean - factor * std, mean + factor * std], 1)
    return bounds


def update(x, factor):
    bounds = torch.full_like(x.k_bounds, math.nan)
    ops.update_bounds(x.k_cache, bounds, x.page_table, x.seq_lens, std_factor=factor)
    return bounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 1.0, 2.5])
def test_bounds_are_those_of_float64(device, dtype, factor):
    case = Case(Shape(dtype, lengths=(37, 16, 1, 130), page_size=16, shared_pages=1))
    bounds = update(case.on(device), factor).cpu()
    # The rounding of the result, and for the mean and the deviation some of float32's.
    rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(bounds.double(), expected(case, factor), rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_key_alone_is_both_bounds(device, factor):
    case = Case(Shape(lengths=(17,)))
    bounds = update(case.on(device), factor).cpu()[int(case.page_table[0, 1])]
    assert torch.equal(bounds[:, 0], case.keys[0][16])
    assert torch.equal(bounds[:, 1], case.keys[0][16])


def test_scores_are_the_mean_and_the_deviation_of_a_product(device):
    case = Case(Shape(lengths=(37, 80), kv_heads=2, group=3, kind=Kind("cache", 1.5)))
    scores = ops.estimate(*case.on(device).scoring, 16).cpu()
    for b, keys in enumerate(case.keys):
        for page, part in enumerate(keys.double().split(16)):
            part = part.repeat_interleave(3, 1)
            q = case.q[b].double()
            wanted = (q * part.mean(0)).sum(-1) + 1.5 * (q.abs() * part.std(0, correction=0)).sum(-1)
            torch.testing.assert_close(scores[b, :, page].double(), wanted, rtol=1e-5, atol=1e-4)
