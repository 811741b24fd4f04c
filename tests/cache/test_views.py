"""Contiguous caches as pages: the same storage, and the results of a paged cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.operator_cases import DTYPES, assert_same_bits
from quest_ops import (
    PagedKVCache,
    PageView,
    append_kv,
    empty_bounds,
    estimate,
    page_view_bhld,
    page_view_blhd,
    sparse_decode,
    topk_pages,
    update_bounds,
)
from quest_ops.bounds import BoundsKind
from quest_ops.views import empty_scales
from torch import Tensor

S, HKV, D, L, P = 8, 3, 64, 40, 5


def bhld(B: int, **how: Any) -> Tensor:
    return torch.full((B, HKV, L, D), math.nan, **how)


def blhd(B: int, **how: Any) -> Tensor:
    return torch.full((B, L, HKV, D), math.nan, **how).transpose(1, 2)


def part_of_longer(B: int, **how: Any) -> Tensor:
    return torch.full((B, HKV, L + 7, D), math.nan, **how)[:, :, 3 : L + 3]


def rows_apart(B: int, **how: Any) -> Tensor:
    return torch.full((2 * B, L + 4, HKV, D), math.nan, **how)[::2, 4:].transpose(1, 2)


def batch_inside(B: int, **how: Any) -> Tensor:
    return torch.full((HKV, L, B, D), math.nan, **how).permute(2, 0, 1, 3)


BOUNDS = pytest.mark.parametrize("kind", ["cache", "int8", "int4"])
LAYOUTS = [bhld, blhd, part_of_longer, rows_apart, batch_inside]


def make(
    layout: Any, B: int, device: str, dtype: torch.dtype, kind: BoundsKind = "cache"
) -> tuple[Tensor, Tensor, PageView, Tensor]:
    """An engine's k, v [B, Hkv, L, D] in the layout, their view and its bounds; filled with NaN, or 77 in bytes."""
    k, v = (layout(B, device=device, dtype=dtype) for _ in range(2))
    if layout in (blhd, rows_apart):
        view = page_view_blhd(k.transpose(1, 2), v.transpose(1, 2), S)
    else:
        view = page_view_bhld(k, v, S)
    bounds = empty_bounds(view, kind)
    memory(bounds).fill_(math.nan if kind == "cache" else 77)
    return k, v, view, bounds


def scales_of(view: PageView, kind: BoundsKind) -> Tensor | None:
    if kind == "cache":
        return None
    scales = empty_scales(view)
    memory(scales).fill_(math.nan)
    return scales


def memory(tensor: Tensor) -> Tensor:
    """A tensor's whole storage."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@BOUNDS
def test_a_view_is_the_cache_itself(device: str, layout: Any, B: int, dtype: torch.dtype, kind: BoundsKind) -> None:
    """Appends through the view write the engine's tensors; all results equal a PagedKVCache's bit for bit."""
    k, v, view, bounds = make(layout, B, device, dtype, kind)
    scales = scales_of(view, kind)
    sizes = {"max_tokens": L, "batch_size": B, "page_size": S}
    paged = PagedKVCache(1, HKV, D, **sizes, dtype=dtype, bounds=kind, std_factor=None, device=device)
    lens, given = torch.zeros(B, dtype=torch.int32, device=device), ([], [])
    assert view.k_cache.data_ptr() == k.data_ptr()
    assert view.v_cache.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert view.page_table.shape == (B, P)
    assert view.page_table.dtype == torch.int32
    for T in (13, 3, 1, 8, 2):
        new = [torch.randn(B, T, HKV, D, device=device).to(dtype) for _ in range(2)]
        append_kv(*new, *view[:2], bounds, view.page_table, lens, None, scales)
        paged.advance(T)
        paged.append(0, *new)
        lens += T
        for tensor, tokens, all_given in zip((k, v), new, given, strict=True):
            all_given.append(tokens.transpose(1, 2))
            assert_same_bits(tensor[:, :, : int(lens[0])], torch.cat(all_given, 2))
            assert tensor[:, :, int(lens[0]) :].isnan().all()
        q = torch.randn(B, min(T, 8), 2 * HKV, D, device=device).to(dtype)
        k_cache, v_cache, k_bounds, k_scales = paged.layer(0)
        scores = estimate(q, bounds, view.page_table, lens, S, scales)
        assert_same_bits(scores, estimate(q, k_bounds, paged.page_table, lens, S, k_scales))
        pages = topk_pages(scores, lens, S, 2, HKV)
        for chosen in (None, pages):
            ours, theirs = (
                sparse_decode(q, *caches, lens, chosen) for caches in ((*view,), (k_cache, v_cache, paged.page_table))
            )
            assert_same_bits(ours[0], theirs[0])
            assert_same_bits(ours[1], theirs[1])


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_memory_is_written(device: str, layout: Any, B: int) -> None:
    """Writing a page of a sequence changes nothing else in the caches and bounds."""
    k, v, view, bounds = make(layout, B, device, torch.float32)
    storages = [torch.empty(0, device=device).set_(t.untyped_storage()) for t in (k, v, bounds)]
    lens = torch.full((B,), 2 * S, dtype=torch.int32, device=device)
    new_lens = torch.zeros_like(lens)
    new_lens[-1] = 1
    new = torch.randn(B, 1, HKV, D, device=device)
    append_kv(new, new, *view[:2], bounds, view.page_table, lens, new_lens)
    assert [int((~t.isnan()).sum()) for t in storages] == [HKV * D, HKV * D, 2 * HKV * D]
    assert_same_bits(k[-1, :, 2 * S], new[-1, 0])
    page = int(view.page_table[-1, 2])
    assert_same_bits(bounds[page], new[-1, 0, :, None].expand(HKV, 2, D).contiguous())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_bounds_write_no_other_memory(device: str, layout: Any) -> None:
    """A page of each head and sequence changes, with one pair of bounds and one scale each."""
    _, _, view, bounds = make(layout, 2, device, torch.float32, "int8")
    scales = scales_of(view, "int8")
    new = torch.randn(2, 1, HKV, D, device=device)
    lens = torch.full((2,), 2 * S, dtype=torch.int32, device=device)
    memory(bounds).fill_(-128)  # no bound has this value
    append_kv(new, new, *view[:2], bounds, view.page_table, lens, None, scales)
    assert int((memory(bounds) != -128).sum()) == 2 * HKV * 2 * D
    assert int((~memory(scales).isnan()).sum()) == 2 * HKV
    torch.testing.assert_close(scales[view.page_table[:, 2].long()], new.abs().amax(-1)[:, 0] / 127)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bounds_of_a_cache_written_by_its_engine(device: str, layout: Any) -> None:
    k, _, view, bounds = make(layout, 2, device, torch.float32)
    k[:, :, :30] = torch.randn(2, HKV, 30, D, device=device)
    lens = torch.tensor([30, 17], dtype=torch.int32, device=device)
    update_bounds(view.k_cache, bounds, view.page_table, lens)
    for b, length in enumerate(lens.tolist()):
        for p in range(-(-length // S)):
            keys = k[b, :, p * S : min(length, (p + 1) * S)]
            expected = torch.stack([keys.amin(1), keys.amax(1)], 1)
            assert_same_bits(bounds[int(view.page_table[b, p])], expected)
    assert bounds[int(view.page_table[1, 3])].isnan().all()


@pytest.mark.parametrize("layout", [bhld, blhd])
def test_bounds_take_no_more_memory_than_pages_need(layout: Any) -> None:
    _, _, view, bounds = make(layout, 4, "cpu", torch.bfloat16)
    assert bounds.untyped_storage().nbytes() == 4 * HKV * P * 2 * D * 2
    assert empty_bounds(view, "int8").untyped_storage().nbytes() == 4 * HKV * P * 2 * D
    assert empty_scales(view).untyped_storage().nbytes() == 4 * HKV * P * 4
    assert view.k_cache.shape[0] == bounds.shape[0] == (3 * HKV * P + P if layout is bhld else 4 * P)
    assert make(part_of_longer, 1, "cpu", torch.bfloat16)[2].k_cache.shape[0] == P  # stride 0 from row to row


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_over_a_view(device: str, backend: str) -> None:
    """Physical pages may overlap in memory."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        k, _, view, bounds = make(bhld, 2, device, torch.float32)
        lens = torch.tensor([30, 17], dtype=torch.int32, device=device)
        prompt = torch.randn(2, 30, HKV, D, device=device)
        append_kv(prompt, prompt, *view[:2], bounds, view.page_table, torch.zeros_like(lens), lens)

        def step(q: Tensor, new: Tensor, view=view, bounds=bounds, lens=lens) -> Tensor:
            append_kv(new, new, *view[:2], bounds, view.page_table, lens)
            lens.add_(1)
            pages = topk_pages(estimate(q, bounds, view.page_table, lens, S), lens, S, 2, HKV)
            return sparse_decode(q, *view, lens, pages)[0]

        run = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        tokens = [(torch.randn(2, heads, D, device=device) for heads in (2 * HKV, HKV)) for _ in range(10)]
        results.append((torch.stack([run(q, new[:, None]) for q, new in tokens]), k))
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize(
    ("k", "v", "page_size", "message"),
    [
        (torch.zeros(2, 3, 40, 64), None, 12, "page_size must be one of 4, 8, 16, 32, 64, 128, got 12"),
        (torch.zeros(3, 40, 64), None, 8, r"k must have 4 dimensions, got \[3, 40, 64\]"),
        (torch.zeros(2, 3, 40, 64), None, 16, "k must hold a positive multiple of 16 tokens"),
        (torch.zeros(2, 3, 0, 64), None, 16, "k must hold a positive multiple of 16 tokens"),
        (torch.zeros(2, 3, 40, 64), torch.zeros(2, 40, 3, 64).transpose(1, 2), 8, "v must have shape .* like k, got"),
        (torch.zeros(2, 3, 40, 64), torch.zeros(2, 3, 40, 64).half(), 8, "v must .* torch.float32 .*, got .*float16"),
        (torch.zeros(2, 3, 64, 64).transpose(2, 3), None, 8, "k must have stride 1 in its last dimension, got 64"),
    ],
)
def test_bad_caches(k: Tensor, v: Tensor | None, page_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        page_view_bhld(k, k if v is None else v, page_size)


def test_bad_blhd_cache() -> None:
    with pytest.raises(ValueError, match=r"\[B, L, Hkv, D\], got \[3, 40, 64\]"):
        page_view_blhd(torch.zeros(3, 40, 64), torch.zeros(3, 40, 64))
