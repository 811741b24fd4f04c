"""Compares two builds of the libraries bit for bit: the same random calls of every operator.

    python bench/compare_builds.py OLD_DIR NEW_DIR [--device cpu cuda] [--cases 200] [--seed 0] [--skip TEXT ...]

Each folder holds ``_C.so`` and, for cuda, ``_C_cuda.so``. Both builds register ``torch.ops.quest``, so each runs in a
process of its own, with torch and nothing of quest_ops. Inputs come from torch's CPU generator, one seed a case, so
both processes see the same bits.

A digest covers every output and all memory around every written tensor; one NaN is as good as another. Error messages
are compared without their place in the source. The exit status is 1 where a case differs or a process fails. An old
build that has no append_codes and rerank_pages is compared without their cases.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
PAGE_SIZES = (8, 16, 32, 64, 128)
LAYOUTS = ("contiguous", "contiguous", "transposed", "padded", "unaligned")
CODED = ("append_codes", "rerank_pages")
GARBAGE = (-1, 2**31 - 1)  # page numbers that lead nowhere
GUARD = 64  # elements before and behind a placed tensor

Results = dict[str, str]  # name of a result -> digest or error message


@dataclass(frozen=True)
class Shape:
    """The integers of a case."""

    dtype: torch.dtype
    head_dim: int
    page_size: int
    kv_heads: int
    group: int
    new_tokens: int  # T; 0: q has no such dimension
    lengths: tuple[int, ...]
    int8: bool = False
    shared_pages: int = 0
    spare_pages: int = 1
    budget: int | None = None  # K; None: drawn
    pool_pages: int | None = None  # long rows read this many pages again and again; None: each page is its own
    layouts: tuple[str, ...] = ("contiguous",) * 4  # of q and new tokens, k_cache, v_cache, bounds

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def __str__(self) -> str:
        values = (f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self)[1:])
        return f"{str(self.dtype).removeprefix('torch.')} " + " ".join(values)


class Draw:
    """Random numbers of one case."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return int(torch.randint(low, max(low, high) + 1, (), generator=self.generator))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=self.generator).to(dtype)

    def integers(self, low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(low, max(low, high) + 1, size, generator=self.generator, dtype=torch.int32)

    def sprinkle(self, tensor: Tensor, *values: float) -> None:
        """Puts each value at up to three random places."""
        flat = tensor.view(-1)
        for value in values:
            if len(flat):
                flat[self.integers(0, len(flat) - 1, (3,)).long()] = value


def draw_shape(draw: Draw, elements: int) -> Shape:
    """A shape over the whole domain, or one that a GPU takes in one launch; a pool of about ``elements`` at most."""
    one_launch = draw.chance(0.5)
    head_dim, page_size = draw.choice(HEAD_DIMS), draw.choice(PAGE_SIZES)
    group = draw.integer(1, 8) if one_launch else draw.choice([*range(1, 17), 32])
    kv_heads = draw.integer(1, max(1, 32 // group))
    batch = draw.integer(1, 4)
    tokens = min(draw.choice((60, 400, 5000)), elements // (batch * kv_heads * head_dim))
    lengths = tuple(
        max(0, draw.integer(0, tokens // page_size) * page_size + draw.choice((0, -1, 1, page_size // 2)))
        for _ in range(batch)
    )
    layouts = [draw.choice(LAYOUTS[:4] if one_launch else LAYOUTS) for _ in range(4)]
    return Shape(
        dtype=draw.choice(DTYPES[1:] if one_launch else DTYPES),
        head_dim=head_dim,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        new_tokens=draw.integer(0, 1 if one_launch else 8),
        lengths=lengths,
        int8=draw.chance(0.35),
        shared_pages=draw.integer(0, 2),
        spare_pages=draw.integer(0, 3),
        layouts=tuple(layouts),
    )


def long_shapes(device: str) -> dict[str, Shape]:
    """Rows past 8,192 and 65,536 pages, and more sequences than one launch takes."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    long = {
        "9,000 pages": Shape(brain, 64, 16, 1, 4, 0, (144003, 5, 132800), budget=32, pool_pages=512),
        "9,000 pages, half read": Shape(half, 128, 16, 2, 2, 1, (144003, 70000), budget=4500, pool_pages=512),
        "9,000 pages of 8 bits": Shape(brain, 64, 8, 1, 4, 0, (72003, 72000), True, budget=100, pool_pages=512),
        "70,000 pages": Shape(single, 64, 8, 1, 2, 2, (560005, 700), budget=64, pool_pages=256),
        "131,072 pages": Shape(half, 64, 16, 1, 4, 0, (2**21 - 1,), budget=300, pool_pages=256),
        "300 sequences": Shape(brain, 64, 16, 1, 2, 0, tuple(range(300)), budget=4),
        "40 sequences": Shape(half, 128, 16, 2, 4, 1, tuple(range(0, 4000, 100)), budget=16, pool_pages=512),
    }
    if device == "cuda":
        long |= {
            "32,768 pages, 8 KV heads": Shape(brain, 128, 16, 8, 4, 0, (2**19,), budget=128, pool_pages=4096),
            "131,072 pages, 8 KV heads": Shape(half, 128, 16, 8, 8, 0, (2**21,), budget=256, pool_pages=4096),
            "8,200 pages, 32 sequences": Shape(
                brain, 128, 16, 8, 4, 0, tuple(131200 - 999 * b for b in range(32)), budget=64, pool_pages=2048
            ),
            "8,200 pages, all read": Shape(half, 128, 32, 4, 8, 1, (262400, 9), budget=9000, pool_pages=2048),
            "16,384 pages of 8 bits": Shape(brain, 128, 16, 8, 4, 0, (2**18, 2**17), True, budget=512, pool_pages=4096),
        }
    return long


def place(tensor: Tensor, layout: str, device: str) -> Tensor:
    """A copy with the layout's strides amid NaN (integers: 77). All of that memory is its ``_base``."""
    order = list(range(tensor.dim()))
    if layout == "transposed" and tensor.dim() > 2:
        order[-3], order[-2] = order[-2], order[-3]
    pad = {"padded": 16, "unaligned": 1}.get(layout, 0)
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(1, tensor.shape[dim]) + pad
    offset = GUARD + pad % 16
    fill = math.nan if tensor.is_floating_point() else 77
    memory = torch.full((offset + step + GUARD,), fill, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, strides, offset).copy_(tensor)


def digest(tensor: Tensor) -> str:
    """Dtype, shape and bits of a tensor, any NaN being the same."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), math.nan, tensor)
    tensor = tensor.cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    data = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:24]}"


def attempt(results: Results, name: str, call: Callable[[], Any], outputs: str, **written: Tensor | None) -> None:
    """Notes the digests of a call's outputs and of the memory that it writes to, or its error."""
    try:
        values = call()
    except RuntimeError as error:
        results[name] = message(error)
        return
    values = values if isinstance(values, tuple) else (values,)
    for key, value in zip(outputs.split(), values, strict=False):
        results[f"{name}.{key}"] = digest(value)
    for key, value in written.items():
        if value is not None:
            results[f"{name}.{key}"] = digest(value._base if value._base is not None else value)


def message(error: RuntimeError) -> str:
    """The error's text without its place in the source."""
    text = str(error).split("\nDeclaration:")[0]  # of the schema, which torch adds
    return re.sub(r"\w+, \S+:\d+, | at \S+, line \d+", "", text)


def quantize(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [N, Hkv, 2, D] as int8 with scales [N, Hkv]: any such numbers will do for a comparison."""
    exact = bounds.float().nan_to_num(0, 0, 0)
    scales = exact.abs().amax((-2, -1)) / 127
    lower, upper = (exact / scales[..., None, None]).nan_to_num(0).unbind(-2)
    return torch.stack([lower.floor(), upper.ceil()], -2).clamp(-128, 127).to(torch.int8), scales


def draw_pages(draw: Draw, s: Shape, start_lens: Tensor, new: int, appended: int) -> tuple[Tensor, int]:
    """A page table with room for new tokens, and the pages of the pool."""
    batch = len(s.lengths)
    P = (max(s.lengths) + max(new, appended) + s.page_size - 1) // s.page_size + s.spare_pages

    # Pages that are written belong to one row alone; the first full ones may be shared.
    own = batch * P if s.pool_pages is None else s.pool_pages + batch * (2 + appended // s.page_size + new)
    page_table = torch.randperm(own, generator=draw.generator).int()
    if s.pool_pages is None:
        page_table = page_table.view(batch, P)
    else:
        written, read = page_table[s.pool_pages :].view(batch, -1), page_table[: s.pool_pages]
        page_table = read[draw.integers(0, s.pool_pages - 1, (batch, P)).long()]
        for b, start in enumerate(start_lens.tolist()):
            room = page_table[b, start // s.page_size :]
            room[: written.shape[1]] = written[b, : len(room)]
    for b, length in enumerate(s.lengths):
        shared = min(s.shared_pages, int(start_lens.min()) // s.page_size)
        page_table[b, :shared] = page_table[0, :shared]
        unread = (max(length + max(new, appended), 1) + s.page_size - 1) // s.page_size
        page_table[b, unread:] = draw.choice((*GARBAGE, own))
    return page_table, own


def run_case(shape: Shape, draw: Draw, device: str) -> Results:
    """All operators but those of codes on the tensors of one shape. No operator's input is another's output."""
    s, ops = shape, torch.ops.quest
    results: Results = {}
    batch, new = len(s.lengths), max(1, s.new_tokens)
    appended = draw.integer(0, 40)  # append_kv takes any number of new tokens
    start_lens = torch.tensor([max(0, n - new) for n in s.lengths], dtype=torch.int32)
    seq_lens = torch.tensor(s.lengths, dtype=torch.int32)
    page_table, own = draw_pages(draw, s, start_lens, new, appended)
    P = page_table.shape[1]

    q_size = (batch, *[s.new_tokens] * bool(s.new_tokens), s.heads, s.head_dim)
    q = draw.normal(*q_size, dtype=s.dtype)
    k_cache, v_cache = (draw.normal(own, s.kv_heads, s.page_size, s.head_dim, dtype=s.dtype) for _ in "kv")
    if draw.chance(0.2):
        draw.sprinkle(k_cache, math.nan)
        draw.sprinkle(v_cache, math.nan, math.inf, -math.inf)
    if draw.chance(0.05):
        draw.sprinkle(q, math.nan)
    k_bounds, k_scales = torch.stack([k_cache.amin(2), k_cache.amax(2)], 2), None
    if s.int8:
        k_bounds, k_scales = quantize(k_bounds)
        k_scales = place(k_scales, s.layouts[3], device)
    page_table, seq_lens, start_lens = (place(x, "unaligned", device) for x in (page_table, seq_lens, start_lens))
    q = place(q, s.layouts[0], device)

    def cache() -> tuple[Tensor, ...]:
        tensors = zip((k_cache, v_cache, k_bounds), s.layouts[1:], strict=True)
        return tuple(place(x, layout, device) for x, layout in tensors)

    def tokens(count: int) -> tuple[Tensor, ...]:
        size = (batch, count, s.kv_heads, s.head_dim)
        return tuple(place(draw.normal(*size, dtype=s.dtype), s.layouts[0], device) for _ in "kv")

    k, v, c = *tokens(appended), cache()
    new_lens = draw.integers(0, appended, (batch,)).to(device) if draw.chance(0.5) else None
    scales = None if k_scales is None else place(k_scales.cpu(), s.layouts[3], device)
    attempt(
        results,
        "append_kv",
        lambda: ops.append_kv(k, v, *c, page_table, start_lens, new_lens, scales),
        "",
        k_cache=c[0],
        v_cache=c[1],
        k_bounds=c[2],
        k_scales=scales,
    )

    c = cache()
    first = draw.integers(0, max(1, *s.lengths), (batch,)).to(device) if draw.chance(0.5) else None
    scales = None if k_scales is None else place(k_scales.cpu(), s.layouts[3], device)
    attempt(
        results,
        "update_bounds",
        lambda: ops.update_bounds(c[0], c[2], page_table, seq_lens, first, scales),
        "",
        k_bounds=c[2],
        k_scales=scales,
    )

    c = cache()
    attempt(results, "estimate", lambda: ops.estimate(q, c[2], page_table, seq_lens, s.page_size, k_scales), "scores")

    sink, recent = draw.integer(0, 2), draw.choice((1, 1, 1, 0, 2))
    budget = draw.choice((1, 2, draw.integer(1, P), P - 1, P, P + 5)) if s.budget is None else s.budget
    budget = max(budget, sink + recent, 1)
    reduce, scale = draw.integer(0, 3), draw.choice((s.head_dim**-0.5, 1.0, 0.37, -0.5))
    size = (*q_size[:-1], P)
    scores = draw.normal(*size) if draw.chance(0.5) else draw.integers(-3, 3, size).float()
    if draw.chance(0.3):
        draw.sprinkle(scores, math.nan, math.inf, -math.inf, -0.0)
    scores = place(scores, draw.choice(LAYOUTS), device)
    attempt(
        results,
        "topk_pages",
        lambda: ops.topk_pages(scores, seq_lens, s.page_size, budget, s.kv_heads, reduce, sink, recent, scale),
        "pages",
    )

    # Lists from anywhere: in no order, with gaps, of any length.
    count = min(budget, P)
    size = (*q_size[:-2], draw.choice((s.kv_heads, s.heads)), P)
    pages = torch.rand(size, generator=draw.generator).argsort(-1)[..., :count].int()
    gaps = torch.rand(pages.shape, generator=draw.generator) < draw.choice((0.0, 0.3, 0.9))
    pages = place(pages.masked_fill(gaps, -1), "unaligned", device)
    for name, chosen in ("sparse_decode", pages), ("sparse_decode, dense", None):
        attempt(
            results,
            name,
            lambda chosen=chosen: ops.sparse_decode(q, c[0], c[1], page_table, seq_lens, chosen, scale),
            "out lse",
        )

    k, v = tokens(new)
    after = start_lens + new
    reduce = draw.choice((0, 1, 1, 2, 2, 3))
    scales = None if k_scales is None else place(k_scales.cpu(), s.layouts[3], device)
    attempt(
        results,
        "decode_step",
        lambda: ops.decode_step(
            q, k, v, *c, page_table, start_lens, after, budget, reduce, sink, recent, scale, scales
        ),
        "out lse pages",
        k_cache=c[0],
        v_cache=c[1],
        k_bounds=c[2],
        k_scales=scales,
    )
    return results


def run_codes(shape: Shape, draw: Draw, device: str) -> Results:
    """append_codes of random keys, and rerank_pages with random codes."""
    s, ops = shape, torch.ops.quest
    results: Results = {}
    batch, new, appended = len(s.lengths), max(1, s.new_tokens), draw.integer(0, 40)
    start_lens = torch.tensor([max(0, n - new) for n in s.lengths], dtype=torch.int32)
    page_table, own = draw_pages(draw, s, start_lens, new, appended)
    P = page_table.shape[1]
    seq_lens = torch.tensor(s.lengths, dtype=torch.int32)
    page_table, seq_lens, start_lens = (place(x, "unaligned", device) for x in (page_table, seq_lens, start_lens))

    size = (own, s.kv_heads, s.page_size)
    codes = place(draw.integers(0, 255, (*size, s.head_dim // 4)).to(torch.uint8), s.layouts[1], device)
    scales = draw.normal(*size).abs()
    if draw.chance(0.1):
        draw.sprinkle(scales, math.nan)
    scales = place(scales, s.layouts[3], device)
    count = min(P, draw.choice((1, 3, 40, P)) if s.budget is None else s.budget)
    lists = (batch, *[s.new_tokens] * bool(s.new_tokens), draw.choice((s.kv_heads, s.heads)), P)
    pages = torch.rand(lists, generator=draw.generator).argsort(-1)[..., :count].int()
    gaps = torch.rand(pages.shape, generator=draw.generator) < draw.choice((0.0, 0.3, 0.9))
    pages = place(pages.masked_fill(gaps, -1), "unaligned", device)
    q = place(draw.normal(*lists[:-2], s.heads, s.head_dim, dtype=s.dtype), s.layouts[0], device)
    scale = draw.choice((s.head_dim**-0.5, 1.0))
    new_lens = draw.integers(0, new, (batch,)).to(device) if draw.chance(0.3) else None
    for reduce in (0, 1):
        attempt(
            results,
            f"rerank_pages, {reduce}",
            lambda reduce=reduce: ops.rerank_pages(
                q, codes, scales, page_table, seq_lens, pages, reduce, scale, new_lens
            ),
            "scores",
        )

    k = draw.normal(batch, appended, s.kv_heads, s.head_dim) * draw.choice((1.0, 100.0, 1e-3))
    if draw.chance(0.2):
        draw.sprinkle(k, math.nan, math.inf, 0.0)
    k = place(k.to(s.dtype), s.layouts[0], device)
    new_lens = draw.integers(0, appended, (batch,)).to(device) if draw.chance(0.5) else None
    attempt(
        results,
        "append_codes",
        lambda: ops.append_codes(k, codes, scales, page_table, start_lens, new_lens),
        "",
        k_codes=codes,
        code_scales=scales,
    )
    return results


def run_infinite_scores(dtype: torch.dtype, device: str) -> Results:
    """Keys with a component of -inf, so that whole rows, or whole splits of a row, score -inf or +inf."""
    ops, draw = torch.ops.quest, Draw(1)
    results: Results = {}
    batch, P, S, D = 4, 100, 16, 64
    k_cache, v_cache = (draw.normal(batch * P, 1, S, D, dtype=dtype) for _ in "kv")
    bounds = torch.stack([k_cache.amin(2), k_cache.amax(2)], 2)
    k_cache.view(batch, P * S, D)[0, :, 5] = -math.inf
    k_cache.view(batch, P * S, D)[1, 300:, 5] = -math.inf
    k_cache.view(batch, P * S, D)[2, 100:900, 5] = -math.inf
    page_table = torch.arange(batch * P, dtype=torch.int32, device=device).view(batch, P)
    seq_lens = torch.tensor([1600, 1599, 1500, 7], dtype=torch.int32, device=device)
    for tokens in (1, 4):
        q = draw.normal(batch, tokens, 4, D, dtype=dtype)
        q[..., 5] = 1
        q = q.to(device)
        k, v = (draw.normal(batch, tokens, 1, D, dtype=dtype).to(device) for _ in "kv")
        k[:, :, :, 5] = -math.inf
        pages = torch.randperm(P, generator=draw.generator)[:60].int().expand(batch, tokens, 1, 60).contiguous()
        for scale in (0.125, 0.0, -0.125):
            name = f"T={tokens}, scale={scale}, "
            cache = [x.clone().to(device) for x in (k_cache, v_cache, bounds)]
            for kind, chosen in ("sparse", pages.to(device)), ("dense", None):
                decode = functools.partial(ops.sparse_decode, q, *cache[:2], page_table, seq_lens, chosen, scale)
                attempt(results, name + kind, decode, "out lse")
            step = functools.partial(ops.decode_step, q, k, v, *cache, page_table, seq_lens - tokens, seq_lens)
            step = functools.partial(step, 30, recent_pages=1, scale=scale)
            attempt(results, name + "decode_step", step, "out lse pages", k_bounds=cache[2])
    return results


def right_arguments(device: str, int8: bool) -> dict[str, dict[str, Any]]:
    """Arguments that each operator takes: B = 2, Hq = 4, Hkv = 2, D = 64, S = 16, P = 4, N = 9."""
    dtype = torch.float16

    def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def lens(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v = zeros(2, 4, 64), zeros(2, 1, 2, 64), zeros(2, 1, 2, 64)
    caches = {"k_cache": zeros(9, 2, 16, 64), "v_cache": zeros(9, 2, 16, 64)}
    bounds = {"k_bounds": zeros(9, 2, 2, 64, dtype=torch.int8 if int8 else dtype)}
    scales = {"k_scales": zeros(9, 2, dtype=torch.float32)} if int8 else {}
    table = {"page_table": torch.arange(8, dtype=torch.int32, device=device).view(2, 4)}
    seq_lens = {"seq_lens": lens(37, 20)}
    codes = {
        "k_codes": zeros(9, 2, 16, 16, dtype=torch.uint8),
        "code_scales": zeros(9, 2, 16, dtype=torch.float32),
    }
    paging = table | seq_lens
    return {
        "append_kv": {"k": k, "v": v, **caches, **bounds, **paging, "new_lens": lens(1, 0), **scales},
        "update_bounds": {"k_cache": caches["k_cache"], **bounds, **paging, "first_token": lens(0, 3), **scales},
        "estimate": {"q": q, **bounds, **paging, "page_size": 16, **scales},
        "topk_pages": {
            "scores": zeros(2, 4, 4, dtype=torch.float32), **seq_lens, "page_size": 16, "k": 3, "num_kv_heads": 2,
        },
        "append_codes": {"k": k, **codes, **paging, "new_lens": lens(1, 0)},
        "rerank_pages": {
            "q": q, **codes, **paging, "pages": zeros(2, 2, 3, dtype=torch.int32), "token_reduce": 0, "scale": 1.0,
        },
        "sparse_decode": {"q": q, **caches, **paging, "pages": zeros(2, 2, 3, dtype=torch.int32)},
        "decode_step": {
            "q": q, "k": k, "v": v, **caches, **bounds, **table, "start_lens": lens(36, 19), **seq_lens,
            "num_pages": 3, **scales,
        },
    }  # fmt: skip


def wrong_values(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Values that an argument should not have, though some may be accepted."""
    if not isinstance(value, Tensor):
        yield from ((str(wrong), wrong) for wrong in (-1, 0, 1, 12, 256, 2**31, 2**62))
        return
    yield "None", None
    yield "another dtype", value.to(torch.float64 if value.is_floating_point() else torch.int64)
    yield "three more dimensions", value[None, None, None]
    yield "no dimensions", value.flatten()[0]
    yield "stride 3", torch.stack([value] * 3, -1)[..., 0]
    for dim, size in enumerate(value.shape):
        yield f"none in dimension {dim}", value.narrow(dim, 0, 0)
        yield f"one less in dimension {dim}", value.narrow(dim, 0, size - 1)
        yield f"one more in dimension {dim}", torch.cat([value, value.narrow(dim, 0, 1)], dim)
    if value.dtype == torch.int32:
        for wrong in (-2, -1, 4, 9, 65, 2**31 - 1):
            yield (
                f"{wrong} in its first place",
                value.clone().flatten().index_fill(0, torch.tensor(0, device=value.device), wrong).view(value.shape),
            )
    if key in ("q", "k", "scores"):
        yield "9 new tokens", torch.stack([value] * 9, 1)


def invalid_calls(device: str) -> Iterator[tuple[str, Results]]:
    """Calls with one wrong argument, values included, and their error messages."""
    os.environ["QUEST_OPS_CHECK"] = "1"
    extra = {"group_reduce": 1, "sink_pages": 0, "recent_pages": 1}
    for int8 in (False, True):
        for name, right in right_arguments(device, int8).items():
            if (int8 and "k_scales" not in right) or not hasattr(torch.ops.quest, name):
                continue
            right = {**right, **extra} if name in ("topk_pages", "decode_step") else right
            for key, value in right.items():
                for wrong, replacement in wrong_values(key, value):
                    case = f"{name} with {'8-bit bounds and ' * int8}{key}: {wrong}"
                    try:
                        getattr(torch.ops.quest, name)(**{**right, key: replacement})
                        yield case, {"error": "none"}
                    except RuntimeError as error:
                        yield case, {"error": message(error)}


def all_cases(device: str, cases: int, seed: int) -> Iterator[tuple[str, Results]]:
    """Every case by its name."""
    has_codes = all(hasattr(torch.ops.quest, name) for name in CODED)
    for index in range(cases):
        draw = Draw(seed * 1_000_003 + index)
        shape = draw_shape(draw, 2**20 if device == "cpu" else 2**22)
        yield f"case {index}: {shape}", run_case(shape, draw, device)
        if has_codes:
            yield f"append_codes and rerank_pages {index}: {shape}", run_codes(shape, draw, device)
    for name, shape in long_shapes(device).items():
        yield f"{name}: {shape}", run_case(shape, Draw(seed), device)
        if has_codes and not shape.int8:
            yield f"append_codes and rerank_pages, {name}: {shape}", run_codes(shape, Draw(seed), device)
    for dtype in DTYPES:
        yield f"infinite scores: {dtype}", run_infinite_scores(dtype, device)
    yield from invalid_calls(device)


def worker(arguments: argparse.Namespace) -> None:
    """Runs all cases on the one build in ``old`` and writes their results as JSON to ``new``."""
    torch.ops.load_library(arguments.old / "_C.so")
    (device,) = arguments.device
    if device == "cuda":
        torch.ops.load_library(arguments.old / "_C_cuda.so")
    results = dict(all_cases(device, arguments.cases, arguments.seed))
    arguments.new.write_text(json.dumps(results))


def run_build(folder: Path, device: str, cases: int, seed: int) -> dict[str, Results]:
    """The results of the build in ``folder``, from a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "results.json"
        command = [sys.executable, __file__, folder.resolve(), output, "--worker"]
        options = ["--device", device, "--cases", str(cases), "--seed", str(seed)]
        subprocess.run([*command, *options], check=True)
        results: dict[str, Results] = json.loads(output.read_text())
    return results


def differences(old: dict[str, Results], new: dict[str, Results]) -> dict[str, list[str]]:
    """The results that differ, or that one build lacks, by the name of their case."""
    found = {}
    for case in old | new:
        before, after = old.get(case, {}), new.get(case, {})
        different = [name for name in before | after if before.get(name) != after.get(name)]
        if different or (case in old) != (case in new):
            found[case] = different
    return found


def compare(arguments: argparse.Namespace, device: str) -> bool:
    """Prints how many cases are equal, and each that is not; True where all are."""
    old, new = (run_build(x, device, arguments.cases, arguments.seed) for x in (arguments.old, arguments.new))
    if not any(case.startswith(CODED) for case in old):
        print(f"{device}: the old build has no {' and '.join(CODED)}")
        new = {case: x for case, x in new.items() if not case.startswith(CODED)}
    skipped = {case for case in old | new if any(text in case for text in arguments.skip)}
    old, new = ({case: x for case, x in build.items() if case not in skipped} for build in (old, new))
    different = differences(old, new)
    results = sum(map(len, old.values()))
    print(
        f"{device}: {len(old | new) - len(different)} cases equal, {len(different)} different, {len(skipped)} skipped; "
        f"{results} results a build"
    )
    for case, names in different.items():
        print(f"  {case}")
        for name in names[:8]:
            print(f"    {name}\n      old {old.get(case, {}).get(name)}\n      new {new.get(case, {}).get(name)}")
        if len(names) > 8:
            print(f"    and {len(names) - 8} more")
    return not different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_DIR")
    parser.add_argument("new", type=Path, metavar="NEW_DIR")
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"), default=["cpu"])
    parser.add_argument("--cases", type=int, default=200, help="random cases; long rows and invalid calls come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="leave out cases with this in their name")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return 0
    try:
        equal = [compare(arguments, device) for device in arguments.device]
    except subprocess.CalledProcessError as error:
        print(f"a build failed: {error}")
        return 1
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
