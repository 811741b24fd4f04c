"""decode_step with lists that sequences keep for some steps: sparse_decode with the lists of the rule, bit for bit."""

import math
from typing import Any

import pytest
import torch
from helpers.operator_cases import DTYPES, KINDS, PAGE_SIZES, Case, Shape, assert_same_bits
from helpers.steps import before_step, caches, four_steps, limits_around, on, one_step
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops
from torch import Tensor

NO_PAGES = (-(2**31), -1, 10**6, 2**31 - 1)


def kept_lists(case: Case, lists: int, room: int, seed: int) -> Tensor:
    """[B, lists, room] int32: pages in any order, and numbers that are none."""
    random = torch.Generator().manual_seed(seed)
    kept = torch.randint(case.page_table.shape[1], (len(case.shape.lengths), lists, room), generator=random)
    wild = torch.tensor(NO_PAGES)[torch.randint(len(NO_PAGES), kept.shape, generator=random)]
    return torch.where(torch.rand(kept.shape, generator=random) < 0.2, wild, kept).int()


def expected_lists(
    case: Case,
    kept: Tensor,
    keeps: list[bool],
    selected: Tensor,
    num_pages: int,
    recent: int,
    budgets: Tensor | None,
    dense_below: int,
) -> tuple[Tensor, Tensor]:
    """The lists to read, [B, Hs, K], and kept_pages after the step."""
    most = selected.shape[-1]
    to_read, after = selected.clone(), kept.clone()
    after[..., :most] = selected
    for b, length in enumerate(case.shape.lengths):
        n, K = math.ceil(length / case.shape.page_size), num_pages if budgets is None else int(budgets[b])
        if keeps[b] and n > K and length > dense_below:
            after[b, :, : K - recent] = kept[b, :, : K - recent]
            after[b, :, K - recent : K] = torch.arange(n - recent, n)
            after[b, :, K:most] = -1
            to_read[b] = after[b, :, :most]
            old = to_read[b, :, : K - recent]
            to_read[b, :, : K - recent] = torch.where((old >= 0) & (old < n - recent), old, -1)
    return to_read, after


def assert_keeps(
    case: Case, device: str, num_pages: int, steps: tuple[int, ...], every: int, room: int = 0, **options: Any
) -> None:
    four = on(case, device)
    selected = four_steps(four, num_pages, **options)[2].cpu()
    kept = kept_lists(case, selected.shape[-2], selected.shape[-1] + room, seed=num_pages)
    flat = selected.flatten(0, -3) if selected.dim() == 4 else selected
    rule = (num_pages, options.get("recent_pages", 1), options.get("budgets"), options.get("dense_below", 0))
    to_read, after = expected_lists(case, kept, [step % every != 0 for step in steps], flat, *rule)
    scale = options.get("scale") or (1 / torch.tensor(float(case.shape.head_dim)).sqrt()).item()
    expected = ops.sparse_decode(*four.attention, to_read.view(selected.shape).to(device), scale, four.new_lens)

    one, written = on(case, device), kept.to(device)
    *actual, pages = one_step(
        one,
        num_pages,
        **options,
        counters=ops.new_counters(len(steps), case.shape.kv_heads, device),
        kept_pages=written,
        kept_steps=torch.tensor(steps, dtype=torch.int32, device=device),
        reselect_every=every,
    )
    for mine, value in zip(actual, expected, strict=True):
        assert_same_bits(mine, value)
    assert pages.shape == (*selected.shape[:-1], 0)
    assert_same_bits(written.cpu(), after)
    for mine, value in zip(caches(one), caches(four), strict=True):
        assert_same_bits(mine._base, value._base)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, dict[str, Any]]:
    page_size = draw(st.sampled_from(PAGE_SIZES))
    lengths = tuple(draw(st.lists(st.integers(1, 12 * page_size), min_size=1, max_size=5)))
    shape = Shape(
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from((64, 80, 128))),
        page_size,
        draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 4, 12))),
        draw(st.integers(0, 1)),
        lengths,
        kind=draw(st.sampled_from(list(KINDS.values()))),
        seed=draw(st.integers(0, 99)),
    )
    sink, recent = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    every = draw(st.integers(1, 4))
    options = {
        "num_pages": draw(st.integers(sink + recent, 9)),
        "group_reduce": draw(st.sampled_from(("none", "max", "sum", "soft"))),
        "sink_pages": sink,
        "recent_pages": recent,
        "steps": tuple(draw(st.integers(0, 2 * every)) for _ in lengths),
        "every": every,
        "room": draw(st.sampled_from((0, 3))),
        "dense_below": draw(st.just(0) | limits_around(lengths)),
    }
    return shape, options


@given(cases())
def test_each_sequence_selects_or_keeps(device: str, drawn: tuple[Shape, dict[str, Any]]) -> None:
    shape, options = drawn
    assert_keeps(before_step(shape), device, **options)


@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("kind", ["minmax", "mean-std-4-bit"])
def test_long_sequences(device: str, kind: str, group: int) -> None:
    """By superpages, in several splits, and with rows that select beside rows that keep."""
    shape = Shape(torch.bfloat16, 128, 4, 1, group, lengths=(40_000, 36_000, 900, 4), kind=KINDS[kind], seed=2)
    case = before_step(shape)
    for steps, dense_below in (((0, 1, 1, 1), 0), ((1, 0, 3, 2), 0), ((3, 3, 3, 3), 0), ((3, 3, 3, 3), 36_000)):
        assert_keeps(case, device, 128, steps, 4, sink_pages=1, dense_below=dense_below)


def test_budgets(device: str) -> None:
    shape = Shape(torch.float16, 64, 16, 2, 4, lengths=(400, 500, 300, 90, 640), kind=KINDS["minmax-8-bit"], seed=3)
    budgets = torch.tensor([3, 8, 12, 8, 2], dtype=torch.int32)
    options = {"budgets": budgets.to(device), "sink_pages": 1}
    for dense_below in (0, 400):
        assert_keeps(before_step(shape), device, 12, (1, 0, 1, 1, 1), 2, **options, dense_below=dense_below)


def test_a_short_sequence_reads_all_its_pages_and_keeps_them(device: str) -> None:
    """In every step, so that its list of the step before does not matter. A longer one reads its kept list."""
    shape = Shape(torch.float16, 64, 16, 2, 4, lengths=(100, 101, 101), seed=6)
    case, counters = before_step(shape), ops.new_counters(3, 2, device)
    kept = torch.tensor([0, 3, 9, -1, 9, 9, 9], dtype=torch.int32, device=device).expand(3, 2, 7).contiguous()
    steps = torch.tensor([1, 1, 2], dtype=torch.int32, device=device)
    options = {"kept_pages": kept, "kept_steps": steps, "reselect_every": 2, "counters": counters}
    out, *_ = one_step(on(case, device), 4, **options, dense_below=100)
    every, _, selected = one_step(on(case, device), 4, dense_below=100)
    assert_same_bits(out[[0, 2]], every[[0, 2]])
    assert not torch.equal(out[1], every[1])
    assert_same_bits(kept[[0, 2]], selected[[0, 2]])
    assert kept[0].tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert kept[1].tolist() == [[0, 3, 9, 6, -1, -1, -1]] * 2


def test_an_idle_sequence_leaves_no_list(device: str) -> None:
    shape = Shape(torch.float16, 64, 16, 2, 4, lengths=(400, 500), kind=KINDS["minmax"], seed=4)
    case = on(before_step(shape), device)
    case = case.having(start_lens=case.start_lens * torch.tensor([1, 0], device=device, dtype=torch.int32))
    case = case.having(seq_lens=case.seq_lens * torch.tensor([1, 0], device=device, dtype=torch.int32))
    kept = kept_lists(case, 2, 6, seed=1).to(device)
    steps = torch.ones(2, dtype=torch.int32, device=device)
    out, *_ = one_step(case, 6, kept_pages=kept, kept_steps=steps, reselect_every=2)
    assert not out[1].any() and (kept[1] == -1).all() and out[0].any()


def test_steps_in_a_graph(device: str) -> None:
    """A replayed step selects and keeps by numbers on the device."""
    if device != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    shape = Shape(torch.bfloat16, 128, 16, 2, 4, lengths=(4000, 900), kind=KINDS["mean-std-4-bit"], seed=5)
    case = on(before_step(shape), device)
    counters, steps = ops.new_counters(2, 2, device), torch.zeros(2, dtype=torch.int32, device=device)
    kept = torch.full((2, 2, 8), -1, dtype=torch.int32, device=device)
    options = {"counters": counters, "kept_pages": kept, "kept_steps": steps, "reselect_every": 3, "sink_pages": 1}
    one_step(case, 8, **options)
    selected, graph = kept.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *_ = one_step(case, 8, **options)
    graph.replay()
    first = out.clone()
    assert_same_bits(kept, selected)
    kept[:, :, 1:-1] = torch.arange(1, 7, dtype=torch.int32, device=device)
    steps += 1
    graph.replay()
    assert (kept[:, :, 1:-1] == torch.arange(1, 7, device=device)).all()
    assert not torch.equal(out, first)
    steps += 2
    graph.replay()
    assert_same_bits(out, first)
    assert_same_bits(kept, selected)
