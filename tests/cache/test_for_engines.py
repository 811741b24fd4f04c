"""What docs/operators.md tells an engine's author: layouts by views, packed queries, lists of pages, moved pages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.operator_cases import assert_same_bits
from quest_ops import append_kv, decode_step, sparse_decode, update_bounds
from torch import Tensor

B, HQ, HKV, S, D, P, N = 2, 4, 2, 8, 64, 6, 14
TABLE = torch.tensor([[5, 1, 9, 12, 0, 3], [2, 7, 13, 4, 11, 8]], dtype=torch.int32)
LENGTHS = [41, 26]


class Cache:
    """A filled cache with int8 bounds; ``split`` makes [N, Hkv, S, D] views of the engine's memory."""

    def __init__(self, device: str, memory: tuple[int, ...], split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        random = torch.Generator().manual_seed(0)
        self.randn = lambda *size: torch.randn(size, generator=random).to(device)
        self.k, self.v = split(torch.full(memory, torch.nan, device=device))
        self.bounds = torch.zeros(N, HKV, 2, D, dtype=torch.int8, device=device)
        self.scales = torch.full((N, HKV), torch.nan, device=device)
        self.table, self.lens = TABLE.to(device), torch.zeros(B, dtype=torch.int32, device=device)
        new = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        k, v = self.randn(B, 41, HKV, D), self.randn(B, 41, HKV, D)
        append_kv(k, v, self.k, self.v, self.bounds, self.table, self.lens, new, self.scales)
        self.lens = new

    def decode(self, T: int) -> tuple[Tensor, Tensor]:
        """A step of T tokens within three pages: its result and its pages."""
        start, self.lens = self.lens, self.lens + T
        q, k, v = (self.randn(B, T, heads, D) for heads in (HQ, HKV, HKV))
        caches = (self.k, self.v, self.bounds, self.table, start, self.lens)
        out, _, pages = decode_step(q, k, v, *caches, 3, k_scales=self.scales)
        return out, pages


def plain(device: str) -> Cache:
    return Cache(device, (2, N, HKV, S, D), lambda kv: (kv[0], kv[1]))


@pytest.mark.parametrize(
    ("memory", "split"),
    [
        ((2, N, S, HKV, D), lambda kv: tuple(x.transpose(1, 2) for x in kv)),
        ((N, 2, S, HKV, D), lambda kv: (kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2))),
        ((N, HKV, S, 2 * D), lambda kv: (kv[..., :D], kv[..., D:])),
        ((N, S, HKV, 2 * D), lambda kv: tuple(x.transpose(1, 2) for x in kv.split(D, -1))),
    ],
    ids=["2NSHD", "N2SHD", "NHS2D", "NSH2D"],
)
def test_combined_caches_by_views(
    device: str, memory: tuple[int, ...], split: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    expected, actual = plain(device), Cache(device, memory, split)
    for T in (1, 3, 1):
        for got, wanted in zip(actual.decode(T), expected.decode(T), strict=True):
            assert_same_bits(got, wanted)
    for pool in ("k", "v", "bounds", "scales"):
        assert_same_bits(getattr(actual, pool), getattr(expected, pool))


def test_a_packed_batch_has_a_row_for_each_token(device: str) -> None:
    """Three tokens of one sequence, one of the other, and an idle row."""
    cache = plain(device)
    q = cache.randn(5, HQ, D)
    request = torch.tensor([0, 0, 0, 1, 0], device=device)
    lens = torch.tensor([39, 40, 41, 26, 0], dtype=torch.int32, device=device)
    out, lse = sparse_decode(q, cache.k, cache.v, cache.table[request], lens)
    for b, rows in ((0, slice(0, 3)), (1, slice(3, 4))):
        one = slice(b, b + 1)
        expected, _ = sparse_decode(q[None, rows], cache.k, cache.v, cache.table[one], cache.lens[one])
        torch.testing.assert_close(out[rows], expected[0], rtol=1e-5, atol=1e-6)
    assert (out[4] == 0).all()
    assert (lse[4] == -torch.inf).all()


@pytest.mark.parametrize(
    "listed", [[4, 0, 2], [-1, 0, -1, 2, 4], [0, 2, 4, 5]], ids=["order", "padding", "past_the_end"]
)
def test_a_list_in_any_order(device: str, listed: list[int]) -> None:
    cache = plain(device)
    q, lens = cache.randn(B, HQ, D), torch.tensor([40, 37], dtype=torch.int32, device=device)
    as_pages = lambda pages: torch.tensor(pages, dtype=torch.int32, device=device).expand(B, HKV, -1)  # noqa: E731
    out, _ = sparse_decode(q, cache.k, cache.v, cache.table[:1].expand(B, -1), lens, as_pages(listed))
    expected, _ = sparse_decode(q, cache.k, cache.v, cache.table[:1].expand(B, -1), lens, as_pages([0, 2, 4]))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_a_repeated_page_counts_twice(device: str) -> None:
    cache = plain(device)
    q = cache.randn(1, HQ, D)
    pages = torch.tensor([0, 1, 1], dtype=torch.int32, device=device).expand(1, HKV, 3)
    out, _ = sparse_decode(q, cache.k, cache.v, cache.table[:1], cache.lens[:1], pages)
    physical = TABLE[0, [0, 1]].tolist()
    k, v = (x[physical].transpose(0, 1).flatten(1, 2).repeat_interleave(HQ // HKV, 0) for x in (cache.k, cache.v))
    weights = (k @ q[0, :, :, None])[..., 0].mul(D**-0.5).exp()
    weights[:, S:] *= 2
    expected = (weights[:, None] @ v)[:, 0] / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("carried", [True, False])
def test_moved_pages_carry_their_bounds_or_get_them_anew(device: str, carried: bool) -> None:
    """A copy on write or a swap: the physical pages of sequence 1 change places."""
    expected, moved = plain(device), plain(device)
    source = TABLE[1].long()
    target = source.roll(1)
    pools = (moved.k, moved.v, *((moved.bounds, moved.scales) if carried else ()))
    for pool in pools:
        pool[target.to(device)] = pool[source.to(device)]
    moved.table = moved.table.clone()
    moved.table[1] = target.int()
    if not carried:
        update_bounds(moved.k, moved.bounds, moved.table, moved.lens, k_scales=moved.scales)
    for got, wanted in zip(moved.decode(1), expected.decode(1), strict=True):
        assert_same_bits(got, wanted)
