"""topk_pages: equal to the reference for exact scores, and as good within rounding for inexact ones."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.operator_cases import LAYOUTS, assert_same_bits, place, place_far_apart
from helpers.selection_rule import EXACT_SUMS, KINDS, assert_list_is_as_good, random_scores, slack
from helpers.steps import limits_around
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops, reference
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    kind: str
    lengths: tuple[int, ...]
    k: int
    reduce: str = "max"
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    new_tokens: int = 0
    sink: int = 0
    recent: int = 1
    scale: float = 0.125
    spare_pages: int = 1
    layout: int = 0
    seed: int = 0
    new_lens: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None
    dense_below: int = 0

    @property
    def visible(self) -> list[list[int]]:
        """Tokens that each new token of each sequence sees."""
        lens = numbers(self.new_lens)
        return reference.visible_by_token(torch.tensor(self.lengths), max(1, self.new_tokens), lens)

    @property
    def places(self) -> int:
        """Of a list."""
        return max(self.k, reference.num_pages(self.dense_below, self.page_size))

    def pages_of(self, b: int) -> int:
        """The most that sequence b selects."""
        if self.lengths[b] <= self.dense_below:
            return self.places
        return self.k if self.budgets is None else min(self.k, max(self.sink + self.recent, self.budgets[b]))

    def scores(self) -> Tensor:
        """NaN, which ranks above everything, in scores past the visible pages."""
        random = torch.Generator().manual_seed(self.seed)
        P = max(reference.num_pages(n, self.page_size) for n in self.lengths) + self.spare_pages
        T = max(1, self.new_tokens)
        scores = random_scores(self.kind, (len(self.lengths), T, self.kv_heads * self.group, P), random)
        for b, row in enumerate(self.visible):
            for t, tokens in enumerate(row):
                scores[b, t, :, reference.num_pages(tokens, self.page_size) :] = math.nan
        return scores if self.new_tokens else scores[:, 0]

    def arguments(self, device: str = "cpu") -> tuple[Any, ...]:
        """Those behind the lengths."""
        numbers_of = (numbers(x, device) for x in (self.new_lens, self.budgets))
        how = (self.page_size, self.k, self.kv_heads, self.reduce, self.sink, self.recent, self.scale)
        return (*how, *numbers_of, self.dense_below)


def numbers(values: tuple[int, ...] | None, device: str = "cpu") -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    page_size = draw(st.sampled_from((4, 8, 16, 32, 64, 128)))
    group = draw(st.integers(1, 16) | st.sampled_from((20, 32)))
    most_pages = draw(st.sampled_from((3, 40, 300)))
    length = st.builds(
        lambda pages, off: max(0, pages * page_size + off), st.integers(0, most_pages), st.integers(-1, 1)
    )
    k = draw(st.integers(1, most_pages + 3))
    sink = draw(st.integers(0, min(4, k)))
    return Selection(
        kind=draw(st.sampled_from(KINDS)),
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=3))),
        k=k,
        reduce=draw(st.sampled_from(("none", "max", "sum", "soft"))),
        page_size=page_size,
        kv_heads=draw(st.integers(1, max(1, 12 // group))),
        group=group,
        new_tokens=draw(st.integers(0, 3) | st.just(8)) if most_pages < 300 else 0,
        sink=sink,
        recent=draw(st.integers(0, min(4, k - sink))),
        scale=draw(st.sampled_from((1.0, 0.125, 0.01))),
        spare_pages=draw(st.integers(0, 3)),
        layout=draw(st.integers(0, len(LAYOUTS) - 1)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@st.composite
def ragged_selections(draw: st.DrawFn) -> Selection:
    """Sequences that differ in their new tokens and budgets, and in the side of dense_below on which they lie."""
    s = draw(selections())
    T = max(1, s.new_tokens)
    news = tuple(draw(st.integers(0, min(T, length))) for length in s.lengths)
    budgets = tuple(draw(st.integers(-1, s.k + 2)) for _ in s.lengths)
    return replace(
        s,
        new_lens=draw(st.sampled_from((None, news))),
        budgets=draw(st.sampled_from((None, budgets))),
        dense_below=draw(limits_around(s.lengths)),
    )


def check(s: Selection, device: str) -> None:
    scores, seq_lens = s.scores(), torch.tensor(s.lengths, dtype=torch.int32)
    actual = ops.topk_pages(
        place(scores, LAYOUTS[s.layout], device), place(seq_lens, "unaligned", device), *s.arguments(device)
    )
    assert actual.dtype == torch.int32
    assert actual.is_contiguous()
    expected = reference.topk_pages(scores, seq_lens, *s.arguments())
    if s.reduce in ("none", "max") or (s.reduce == "sum" and s.kind in EXACT_SUMS):
        assert actual.cpu().tolist() == expected.tolist()
        return
    assert actual.shape == expected.shape
    T = max(1, s.new_tokens)
    scores = scores.view(len(s.lengths), T, s.kv_heads * s.group, -1).double()
    for b, rows in enumerate(actual.cpu().view(len(s.lengths), T, -1, s.places).tolist()):
        rule = replace(s, k=s.pages_of(b))
        for t, lists in enumerate(rows):
            n = reference.num_pages(s.visible[b][t], s.page_size)
            for h, padded in enumerate(lists):
                assert_list_is_as_good(padded, h, scores[b, t, :, :n], rule)


@given(selections())
def test_selection_meets_the_reference(device: str, s: Selection) -> None:
    check(s, device)


@given(ragged_selections())
def test_sequences_that_differ_meet_the_reference(device: str, s: Selection) -> None:
    check(s, device)


@pytest.mark.parametrize("reduce", ["none", "max", "sum", "soft"])
@pytest.mark.parametrize("new_tokens", [0, 3])
def test_short_sequences_select_every_page(device: str, new_tokens: int, reduce: str) -> None:
    """The other sequences select as they do without dense_below, budgets included. 100 tokens are in 7 pages."""
    lengths = (99, 100, 101, 700, 0, 16)
    few = Selection(
        "normal", lengths, 3, reduce, new_tokens=new_tokens, sink=1, budgets=(2,) * len(lengths), new_lens=(1,) * 6
    )
    s = replace(few, dense_below=100)
    scores, seq_lens = s.scores().to(device), torch.tensor(lengths, dtype=torch.int32, device=device)
    pages = ops.topk_pages(scores, seq_lens, *s.arguments(device))
    others = ops.topk_pages(scores, seq_lens, *few.arguments(device))
    assert pages.shape == (*others.shape[:-1], 7)
    assert_same_bits(pages[[2, 3]], torch.nn.functional.pad(others[[2, 3]], (0, 4), value=-1))
    for b, n in ((0, 7), (1, 7), (4, 0), (5, 1)):
        lists = pages[b, 0] if new_tokens else pages[b]
        assert lists.tolist() == [[*range(n), *[-1] * (7 - n)]] * len(lists)


@pytest.mark.parametrize("reduce", ["max", "soft"])
@pytest.mark.parametrize("dense_below", [16 * 8_193, 16 * 20_000, 16 * 30_000])
def test_long_sequences_select_every_page(device: str, dense_below: int, reduce: str) -> None:
    """Rows that may be split select without scores, beside one that needs them."""
    lengths = (16 * 20_000, 16 * 8_193 - 5, 16 * 8_193 + 1, 500, 0)
    check(Selection("equal", lengths, 40, reduce, kv_heads=1, dense_below=dense_below), device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["none", "max", "sum", "soft"])
def test_every_kind_of_score(device: str, kind: str, reduce: str) -> None:
    check(Selection(kind, (16 * 150, 16 * 40 + 1, 0, 1), 37, reduce, new_tokens=2, sink=2, recent=2), device)


@pytest.mark.parametrize("kind", ["normal", "equal", "lowest bits", "special"])
@pytest.mark.parametrize("k", [1, 128, 4096, 70_000])
def test_a_million_tokens(device: str, kind: str, k: int) -> None:
    """65,536 pages: no page is dropped where scores cluster."""
    check(Selection(kind, (16 * 65_536 - 5,), k, kv_heads=1, group=2, spare_pages=0), device)


@pytest.mark.parametrize("kind", ["normal", "equal", "lowest bits", "special"])
@pytest.mark.parametrize("reduce", ["none", "max"])
@pytest.mark.parametrize(("k", "sink", "recent"), [(40, 0, 1), (300, 100, 199), (500, 0, 0)])
def test_ragged_lengths_up_to_many_pages(device: str, kind: str, reduce: str, k: int, sink: int, recent: int) -> None:
    """Around 8,192 pages a row may be split; forced pages lie in two splits."""
    pages = (20_000, 16_385 + 50, 8_193, 8_192, 8_191, 2_049, 500, 1, 0)
    lengths = tuple(16 * n for n in pages)
    check(Selection(kind, lengths, k, reduce, sink=sink, recent=recent, kv_heads=1, group=2), device)


@pytest.mark.parametrize("reduce", ["sum", "soft"])
def test_a_million_tokens_reduced(device: str, reduce: str) -> None:
    """Compares the scores of selected and unselected pages, since sums over thousands of pages are inexact."""
    s = Selection("normal", (16 * 65_536,), 2048, reduce, kv_heads=1, group=4, spare_pages=0)
    scores = s.scores()
    pages = (
        ops.topk_pages(scores.to(device), torch.tensor(s.lengths).int().to(device), *s.arguments())[0, 0].cpu().long()
    )
    assert (pages.diff() > 0).all()
    assert pages[0] >= 0
    assert pages[-1] == 65_535
    reduced = reference.reduce_group(scores[0].double(), 1, reduce, s.scale)
    error = slack(scores[0].double(), reduced, s)[0]
    left = torch.ones(65_536, dtype=torch.bool)
    left[pages] = False
    taken = pages[:-1]
    assert (reduced[0, taken] + error[taken]).min() >= (reduced[0, left] - error[left]).max()


def test_zeros_of_either_sign_tie(device: str) -> None:
    scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0, 0.0], device=device).view(1, 1, 6)
    pages = ops.topk_pages(scores, torch.tensor([96], dtype=torch.int32, device=device), 16, 3, 1, recent_pages=0)
    assert pages.tolist() == [[[0, 1, 2]]]


def test_scores_past_2_31_elements(device: str) -> None:
    s = Selection("normal", (16 * 50, 16 * 31), 8)
    scores, seq_lens = s.scores(), torch.tensor(s.lengths, dtype=torch.int32, device=device)
    far = ops.topk_pages(place_far_apart(scores, device), seq_lens, *s.arguments())
    assert_same_bits(far, ops.topk_pages(scores.to(device), seq_lens, *s.arguments()))


def test_nothing_to_do(device: str) -> None:
    seq_lens = torch.zeros(3, dtype=torch.int32, device=device)
    for scores in (torch.rand(3, 4, 5, device=device), torch.rand(3, 4, 0, device=device)):
        assert ops.topk_pages(scores, seq_lens, 16, 2, 2).tolist() == [[[-1, -1]] * 2] * 3
        assert ops.topk_pages(scores[:0], seq_lens[:0], 16, 2, 2).shape == (0, 2, 2)
