"""The same bits in every rerun, batch, capacity, number of threads, stream and CUDA-graph replay."""

import pytest
import torch
from helpers.operator_cases import DTYPES, KINDS, UNREAD_BYTE, Case, Kind, Shape, assert_same_bits, shapes
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops
from torch import Tensor


def run(x: Case, k: int = 6, reduce: str = "max") -> dict[str, Tensor]:
    """The three operators in a row, and dense attention."""
    s = x.shape
    scores = ops.estimate(*x.scoring, s.page_size, x.k_scales)
    pages = ops.topk_pages(scores, x.seq_lens, s.page_size, k, s.kv_heads, reduce, scale=s.head_dim**-0.5)
    out, lse = ops.sparse_decode(*x.attention, pages)
    dense_out, dense_lse = ops.sparse_decode(*x.attention)
    return {"scores": scores, "pages": pages, "out": out, "lse": lse, "dense_out": dense_out, "dense_lse": dense_lse}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rows: slice = slice(None)) -> None:
    for name, value in expected.items():
        got = actual[name][..., : value.shape[-1]]  # a larger capacity adds scores of pages that no sequence has
        assert_same_bits(got, value[rows])


def row(x: Case, b: int) -> Case:
    return x.having(q=x.q[b : b + 1], page_table=x.page_table[b : b + 1], seq_lens=x.seq_lens[b : b + 1])


reduces = st.sampled_from(("none", "max", "sum", "soft"))


@given(shapes(any_kind=True), reduces)
def test_reruns(device: str, shape: Shape, reduce: str) -> None:
    x = Case(shape).on(device)
    first = run(x, reduce=reduce)
    for _ in range(3):
        assert_same(run(x, reduce=reduce), first)


@given(shapes(any_kind=True), reduces)
def test_a_row_alone_is_the_row_in_a_batch(device: str, shape: Shape, reduce: str) -> None:
    x = Case(shape).on(device)
    together = run(x, reduce=reduce)
    for b in range(len(shape.lengths)):
        assert_same(run(row(x, b), reduce=reduce), together, slice(b, b + 1))


@given(shapes(any_kind=True), st.integers(1, 600), reduces)
def test_capacity(device: str, shape: Shape, more: int, reduce: str) -> None:
    x = Case(shape).on(device)
    expected = run(x, reduce=reduce)
    larger = x.having(page_table=torch.nn.functional.pad(x.page_table, (0, more), value=-1))
    assert_same(run(larger, reduce=reduce), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows(device: str, dtype: torch.dtype) -> None:
    """Rows of very different lengths, so that work is split differently alone and together."""
    shape = Shape(dtype, 128, 16, 2, 4, lengths=(12_000, 1, 800, 5000), seed=4)
    x = Case(shape).on(device)
    together = run(x, k=128)
    assert_same(run(x, k=128), together)
    for b in range(4):
        assert_same(run(row(x, b), k=128), together, slice(b, b + 1))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype: torch.dtype, kind: Kind) -> None:
    """With any number of CPU threads."""
    x = Case(Shape(dtype, 64, 16, 2, 4, new_tokens=2, lengths=(5000, 70, 900), kind=kind, seed=5)).on("cpu")
    before, expected = torch.get_num_threads(), run(x, k=64)
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert_same(run(x, k=64), expected)
            bounds = torch.full_like(x.k_bounds, UNREAD_BYTE if kind.scaled else torch.nan)
            scales = torch.full_like(x.k_scales, torch.nan) if kind.scaled else None
            ops.update_bounds(x.k_cache, bounds, x.page_table, x.seq_lens, None, scales, kind.std_factor)
            assert_same_bits(bounds, x.k_bounds)
            if kind.scaled:
                assert_same_bits(scales, x.k_scales)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stream(dtype: torch.dtype) -> None:
    """On a side stream the operators run after the work queued there before them."""
    shape = Shape(dtype, 128, 16, 2, 4, lengths=(3000, 100))
    x = Case(shape).on("cuda")
    expected = run(x)
    late = x.having(q=torch.zeros_like(x.q), k_cache=torch.zeros_like(x.k_cache))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.q.copy_(x.q)
        late.k_cache.copy_(x.k_cache)
        actual = run(late)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.gpu
def test_graph_replays_follow_the_lengths() -> None:
    """Captured once and replayed as the sequences grow in place, equal to eager mode at each length."""
    shape = Shape(torch.bfloat16, 64, 16, 2, 2, lengths=(200, 90))
    case = Case(shape)
    x = case.on("cuda")
    final = [t.clone() for t in (x.k_cache, x.v_cache, x.k_bounds)]
    k, v = (torch.zeros(2, 1, 2, 64, dtype=shape.dtype, device="cuda") for _ in "kv")
    before = torch.zeros_like(x.seq_lens)

    def step() -> dict[str, Tensor]:
        ops.append_kv(k, v, x.k_cache, x.v_cache, x.k_bounds, x.page_table, before)
        x.seq_lens.copy_(before + 1)
        return run(x)

    def load(length: int) -> None:
        before.fill_(length)
        for b in range(2):
            k[b, 0], v[b, 0] = case.keys[b][length].cuda(), case.values[b][length].cuda()

    load(0)
    step()  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in range(90):
        load(length)
        graph.replay()
        assert_same(run(x), captured)
    full = case.page_table[1, : 90 // 16].long()
    for actual, expected in zip((x.k_cache, x.v_cache, x.k_bounds), final, strict=True):
        assert_same_bits(actual[full], expected[full])
