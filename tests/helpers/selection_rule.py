"""The rule by which selected pages are judged where sums of scores are not exact."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from quest_ops import reference
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
KINDS = ("normal", "equal", "integers", "lowest bits", "subnormal", "special")
EXACT_SUMS = ("equal", "integers", "subnormal", "special")


class Selection(Protocol):
    """Arguments of topk_pages."""

    @property
    def reduce(self) -> str: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def sink(self) -> int: ...
    @property
    def recent(self) -> int: ...
    @property
    def scale(self) -> float: ...


def random_scores(kind: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
    integers = torch.randint(-4, 5, size, generator=random).float()
    if kind == "normal":
        return torch.randn(size, generator=random) * 10
    if kind == "equal":
        return torch.full(size, -1.5)
    if kind == "integers":
        return integers
    if kind == "lowest bits":
        return 3 + (integers + 4) * 2 * EPS
    if kind == "subnormal":
        return integers * 2.0**-149
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0])
    return torch.where(integers > 0, integers, special[torch.randint(0, 6, size, generator=random)])


def slack(scores: Tensor, reduced: Tensor, s: Selection) -> Tensor:
    """The error that float32 allows in the reduced scores [Hs, n]."""
    if s.reduce == "sum":
        return scores.unflatten(0, (s.kv_heads, s.group)).abs().sum(1) * s.group * EPS
    # soft: an exponent's error is its size in EPS, the exponential adds a few EPS, the sum over n pages n.
    exponent = (scores * s.scale).abs().nan_to_num(posinf=0).amax()
    return reduced * (4 * exponent + 8 + scores.shape[-1] + s.group) * EPS + s.group * torch.finfo(torch.float32).tiny


def assert_as_good(chosen: list[int], h: int, scores: Tensor, s: Selection) -> None:
    """No unselected page beats a selected one by more than rounding; equal scores give the lower page.

    Args:
        chosen: pages of a list, ascending.
        h: its selection head.
        scores: float64 [Hq, n] of the visible pages.
        s: the other arguments of topk_pages.
    """
    n = scores.shape[-1]
    free = list(range(s.sink, n - s.recent))
    taken, left = ([page for page in free if (page in chosen) == wanted] for wanted in (True, False))
    if not taken or not left:
        return
    reduced = reference.reduce_group(scores, s.kv_heads, s.reduce, s.scale)
    error = slack(scores, reduced, s)[h]
    row = reduced[h]
    if row.isnan().any():  # a NaN or +inf makes the whole softmax NaN: every page ties
        assert row.isnan().all()
        assert taken == free[: len(taken)]
        return
    assert (row[taken] + error[taken]).min() >= (row[left] - error[left]).max()
    columns = scores[h * s.group : (h + 1) * s.group].T.tolist()
    last_taken = {tuple(columns[page]): page for page in taken}
    assert all(page > last_taken.get(tuple(columns[page]), -1) for page in left)


def assert_list_is_as_good(padded: list[int], h: int, scores: Tensor, s: Selection) -> None:
    """A padded list of ``s.k`` pages is well formed, holds the forced pages, and is :func:`assert_as_good`."""
    n = scores.shape[-1]
    chosen = padded[: min(n, s.k)]
    assert padded[len(chosen) :] == [-1] * (len(padded) - len(chosen))
    assert chosen == sorted(set(chosen))
    assert not chosen or 0 <= chosen[0] <= chosen[-1] < n
    forced = {*range(min(s.sink, n)), *range(max(0, n - s.recent), n)}
    assert n <= s.k or forced <= set(chosen)
    assert_as_good(chosen, h, scores, s)
