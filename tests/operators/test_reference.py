"""The specification against independent formulas. It judges the kernels, so they do not judge it."""

import functools
import math
from fractions import Fraction

import torch
from helpers.operator_cases import Case, Shape, assert_exact, assert_same_bits, shapes
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import reference


@given(shapes())
def test_bounds_are_the_extremes_of_each_page_of_tokens(shape: Shape) -> None:
    case = Case(shape)
    S = shape.page_size
    for b, keys in enumerate(case.keys):
        for page, tokens in enumerate(keys.split(S) if len(keys) else ()):
            bounds = case.k_bounds[case.page_table[b, page]]
            assert_exact(bounds[:, 0], tokens.min(0).values)
            assert_exact(bounds[:, 1], tokens.max(0).values)


@given(st.integers(1, 128), st.sampled_from((0.0, 0.5, 1.0, 3.0)), st.integers(0, 2**31 - 1))
def test_mean_and_standard_deviation_meet_float64(count: int, factor: float, seed: int) -> None:
    """Within a few roundings of float32, however far the keys lie from zero."""
    random = torch.Generator().manual_seed(seed)
    places = torch.randn(8, generator=random) * 10.0 ** torch.randint(-2, 3, (8,), generator=random)
    keys = places + torch.randn(count, 8, generator=random)
    lower, upper = reference.bounds_of(keys, factor).double()
    mean, std = keys.double().mean(0), keys.double().std(0, correction=0)
    allowed = torch.finfo(torch.float32).eps * (4 * keys.double().abs().amax(0) + count * (1 + factor) * std)
    assert (((lower + upper) / 2 - mean).abs() <= allowed).all()
    assert (((upper - lower) / 2 - factor * std).abs() <= allowed).all()


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda x: len(x) % 2 == 0))
def test_two_numbers_a_byte(numbers: list[int]) -> None:
    whole = torch.tensor(numbers, dtype=torch.int8)
    packed = reference.pack(whole)
    assert packed.tolist() == [
        (even + 8) + 16 * (odd + 8) for even, odd in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    assert_exact(reference.unpack(packed), whole)


def of_all_sizes(*size: int, seed: int) -> torch.Tensor:
    """Numbers of every float32 exponent, zero and the subnormals included."""
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randn(size, generator=random) * 2.0 ** torch.randint(-3, 4, size, generator=random)
    return numbers * 2.0 ** torch.randint(-150, 120, (*size[:-2], 1, 1), generator=random).double()


@given(st.integers(0, 2**31 - 1))
def test_bytes_are_the_tightest_outside_the_bounds(seed: int) -> None:
    """In exact fractions: the scale is the smallest, and the bounds are its next multiples outward."""
    bounds = of_all_sizes(4, 2, 8, seed=seed).float().sort(-2).values
    k_bounds, scales = reference.quantize(bounds)
    for exact, numbers, scale in zip(bounds.tolist(), k_bounds.tolist(), scales, strict=True):
        largest = max(abs(Fraction(x)) for x in exact[0] + exact[1])
        smaller = scale.nextafter(torch.tensor(-math.inf))
        assert Fraction(scale.item()) * 127 >= largest
        assert largest == 0 or Fraction(smaller.item()) * 127 < largest
        if largest == 0:
            assert numbers == [[0] * 8] * 2
            continue
        for x, number in zip(exact[0], numbers[0], strict=True):
            assert number == math.floor(Fraction(x) / Fraction(scale.item()))
        for x, number in zip(exact[1], numbers[1], strict=True):
            assert number == math.ceil(Fraction(x) / Fraction(scale.item()))


@given(shapes())
def test_estimate_is_the_sum_of_the_larger_products_and_bounds_every_key(shape: Shape) -> None:
    case = Case(shape)
    T, S = max(1, shape.new_tokens), shape.page_size
    scores = reference.estimate(*case.scoring, S).view(-1, T, shape.heads, shape.capacity)
    q = case.q.double().view(-1, T, shape.heads, shape.head_dim)
    for b, length in enumerate(shape.lengths):
        keys = case.keys[b].double().repeat_interleave(shape.group, 1)
        for t in range(T):
            n = -(-max(0, length - T + 1 + t) // S)
            assert (scores[b, t, :, n:] == -math.inf).all()
            for page in range(n):
                bounds = case.k_bounds[case.page_table[b, page]].double().repeat_interleave(shape.group, 0)
                expected = (q[b, t, :, None] * bounds).amax(1).sum(-1)
                torch.testing.assert_close(scores[b, t, :, page], expected, rtol=1e-12, atol=1e-12)
                assert ((keys[page * S : (page + 1) * S] * q[b, t]).sum(-1) <= expected + 1e-9).all()


@given(shapes(), st.booleans(), st.floats(0.05, 2))
def test_decode_is_masked_dense_attention(shape: Shape, per_head: bool, scale: float) -> None:
    case = Case(shape)
    T, S, P = max(1, shape.new_tokens), shape.page_size, shape.capacity
    pages = case.random_pages(P, per_head, shuffled=True)
    for given_pages in (pages, None):
        out, lse = reference.sparse_decode(*case.attention, given_pages, scale)
        out, lse = out.view(-1, T, shape.heads, shape.head_dim), lse.view(-1, T, shape.heads)
        for b, length in enumerate(shape.lengths):
            if not length:
                assert (out[b] == 0).all()
                assert (lse[b] == -math.inf).all()
                continue
            keys, values = (
                x[b].double().transpose(0, 1).repeat_interleave(shape.group, 0) for x in (case.keys, case.values)
            )
            query = case.q[b].view(T, shape.heads, -1).transpose(0, 1).double()
            position = torch.arange(length)
            mask = (position <= torch.arange(length - T, length)[:, None]).expand(shape.heads, -1, -1)
            if given_pages is not None:
                lists = pages[b].view(T, -1, P).transpose(0, 1).repeat_interleave(shape.heads // pages.shape[-2], 0)
                mask = mask & (lists[..., None] == position // S).any(-2)
            expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
            expected = expected.masked_fill(~mask.any(-1, keepdim=True), 0)
            torch.testing.assert_close(out[b], expected.transpose(0, 1), rtol=1e-9, atol=1e-12)
            logits = (query @ keys.transpose(1, 2) * scale).masked_fill(~mask, -math.inf)
            torch.testing.assert_close(lse[b], logits.exp().sum(-1).log().T, rtol=1e-9, atol=1e-12)


def test_scores_of_minus_infinity() -> None:
    """They weigh nothing beside others, and make an empty row where there are no others."""
    case = Case(Shape(lengths=(40, 40, 40)))
    case.q[..., 0] = 1
    for b, tokens in ((0, range(40)), (1, range(20, 40))):
        page, slot = case.slots(b, tokens)
        case.k_cache[page, :, slot, 0] = -math.inf
    out, lse = reference.sparse_decode(*case.attention)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    shorter = reference.sparse_decode(*case.attention[:4], case.seq_lens - 20)
    assert_exact(out[1], shorter[0][1])
    assert_exact(lse[1], shorter[1][1])
    assert lse[1:].isfinite().all()


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 4), st.integers(0, 4), st.integers(0, 2**31 - 1))
def test_selection_is_a_stable_sort(n: int, k: int, sink: int, recent: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    k = max(k, sink + recent)
    scores = torch.randint(-3, 4, (n,), generator=random).float()
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0])
    scores = torch.where(torch.rand(n, generator=random) < 0.3, special[torch.arange(n) % 6], scores)
    pages = reference.topk_pages(scores[None, None], torch.tensor([n * 16]), 16, k, 1, "max", sink, recent)
    forced = sorted({*range(min(sink, n)), *range(max(0, n - recent), n)})
    # torch.sort puts NaN first too.
    order = [i for i in scores.sort(descending=True, stable=True).indices.tolist() if i not in forced]
    expected = sorted((forced + order)[:k])
    assert pages[0, 0].tolist() == expected + [-1] * (k - len(expected))


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 2**31 - 1))
def test_heads_of_a_group_are_reduced_as_named(n: int, kv_heads: int, group: int, scale: float, seed: int) -> None:
    scores = torch.randn(kv_heads * group, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 8
    exponentials = (scores * scale).exp()
    heads = scores.view(kv_heads, group, n).unbind(1)
    probabilities = (exponentials / exponentials.sum(-1, keepdim=True)).view(kv_heads, group, n).unbind(1)
    expected = {
        "none": scores,
        "max": functools.reduce(torch.maximum, heads),
        "sum": sum(heads),
        "soft": sum(probabilities),
    }
    for how, value in expected.items():
        torch.testing.assert_close(reference.reduce_group(scores, kv_heads, how, scale), value, rtol=1e-9, atol=1e-12)


@given(shapes(max_new_tokens=0), st.integers(0, 40))
def test_appending_equals_having_had_the_tokens(shape: Shape, new: int) -> None:
    """A cache that loses its last tokens and gets them again is as before."""
    case = Case(shape)
    counts = torch.tensor([min(new, n) for n in shape.lengths]).int()
    before = case.seq_lens - counts
    k, v = (
        torch.full((len(shape.lengths), new, shape.kv_heads, shape.head_dim), math.nan, dtype=shape.dtype) for _ in "kv"
    )
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    for b, count in enumerate(counts.tolist()):
        k[b, :count], v[b, :count] = (x[b][shape.lengths[b] - count :] for x in (case.keys, case.values))
        page, slot = case.slots(b, range(shape.lengths[b] - count, shape.lengths[b]))
        k_cache[page, :, slot] = v_cache[page, :, slot] = 1e4
    bounds = reference.update_bounds(k_cache, case.k_bounds, case.page_table, case.seq_lens)
    result = reference.append_kv(k, v, k_cache, v_cache, bounds, case.page_table, before, counts)
    for actual, expected in zip(result, (case.k_cache, case.v_cache, case.k_bounds), strict=True):
        assert_same_bits(actual, expected)
