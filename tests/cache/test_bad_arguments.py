"""Wrong arguments of QuestConfig, PagedKVCache and quest_attention: the exact sentence, and nothing has changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from quest_ops import PagedKVCache, QuestConfig, quest_attention
from torch import Tensor

PAGE_SIZES = "must be one of 4, 8, 16, 32, 64, 128, got"
FACTOR = "std_factor must be a finite number of at least 0, or None, got"


def ids(rows: list[Any]) -> list[str]:
    """Names of cases by their messages, without the signs that have a meaning to pytest."""
    return [f"{i}-{re.sub(r'[^a-z0-9]+', '_', row[-1])[:40]}" for i, row in enumerate(rows)]


CONFIG: list[tuple[dict[str, Any], str]] = [
    *(
        ({"budget": x}, f"budget must be a whole number, or a list with one for each layer, got {x!r}")
        for x in (2048.0, 100.5, math.nan, "2048", None, True, torch.tensor(2048))
    ),
    ({"budget": 15}, "budget must be at least a page, 16 tokens, got 15"),
    *(({"page_size": x}, f"page_size {PAGE_SIZES} {x}") for x in (16.0, 12, 0, "16", None, torch.tensor(16))),
    ({"page_size": torch.tensor([16, 16])}, f"page_size {PAGE_SIZES} tensor([16, 16])"),
    *(
        ({name: x}, f"{name} must be a whole number, got {x!r}")
        for name in ("sink_pages", "recent_pages", "dense_layers", "dense_below")
        for x in (1.0, 1.5, math.nan, "1", torch.tensor(1))
    ),
    *(({name: None}, f"{name} must be a whole number, got None") for name in ("sink_pages", "recent_pages")),
    *(({name: -1}, f"{name} must be at least 0, got -1") for name in ("sink_pages", "recent_pages", "dense_layers")),
    (
        {"budget": 32, "sink_pages": 2},
        "sink_pages + recent_pages must be at most the 2 pages of the budget, got 2 + 1",
    ),
    *(({"std_factor": x}, f"{FACTOR} {x!r}") for x in (-1, math.nan, math.inf, 1e39, "1", torch.tensor(1.0))),
    *(
        ({"group_reduce": x}, f"group_reduce must be one of none, max, sum, soft, got {x!r}")
        for x in ("mean", None, 1, ["max"])
    ),
    *(({"bounds": x}, f"bounds must be one of cache, int8, int4, got {x!r}") for x in ("int2", None, 8, ["int8"])),
    ({"selector": 3}, "selector must be a function or None, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), CONFIG, ids=ids(CONFIG))
def test_config(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuestConfig(**arguments)


RIGHT = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "max_tokens": 64, "batch_size": 2}
CACHE: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: x}, f"{name} must be a whole number, got {x!r}")
        for name in ("num_layers", "num_kv_heads", "max_tokens", "batch_size", "num_pages")
        for x in (2.0, 2.5, math.nan, "2", torch.tensor(2))
    ),
    *(
        ({name: x}, f"{name} must be at least 1, got {x}")
        for name in ("num_layers", "num_kv_heads", "max_tokens", "batch_size", "num_pages")
        for x in (0, -1)
    ),
    *(({"head_dim": x}, f"head_dim must be one of 64, 80, 96, 128, 192, 256, got {x}") for x in (64.0, 65, 0, None)),
    *(({"page_size": x}, f"page_size {PAGE_SIZES} {x}") for x in (16.0, 12, None)),
    *(
        ({"dtype": x}, f"dtype must be one of torch.float32, torch.float16, torch.bfloat16, got {x}")
        for x in ("float32", torch.int8, torch.float64, None)
    ),
    ({"bounds": "int2"}, "bounds must be one of cache, int8, int4, got int2"),
    *(({"std_factor": x}, f"{FACTOR} {x!r}") for x in (-1, math.nan, math.inf, 1e39, "1")),
]


@pytest.mark.parametrize(("arguments", "message"), CACHE, ids=ids(CACHE))
def test_new_cache(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PagedKVCache(**(RIGHT | arguments))


WHOLE = "must be a whole number, got"
NEW_LENS = "new_lens must hold 2 numbers from 0 to num_new, 2, got"
METHODS: list[tuple[str, tuple[Any, ...], str]] = [
    *(("advance", (x,), f"num_new {WHOLE} {x!r}") for x in (1.0, math.nan, None, "1", torch.tensor(1))),
    ("advance", (0,), "num_new must be at least 1, got 0"),
    ("advance", (2, [1]), f"{NEW_LENS} [1]"),
    ("advance", (2, [1, 3]), f"{NEW_LENS} [1, 3]"),
    ("advance", (2, [-1, 1]), f"{NEW_LENS} [-1, 1]"),
    ("advance", (2, 3), f"{NEW_LENS} 3"),
    ("advance", (2, [1.0, 2.0]), f"each of new_lens {WHOLE} 1.0"),
    ("advance", (2, [None, 2]), f"each of new_lens {WHOLE} None"),
    ("advance", (2, torch.tensor([1.0, 2.0])), "new_lens must be int32 [2], got torch.float32 [2]"),
    ("advance", (2, torch.tensor([1, 2])), "new_lens must be int32 [2], got torch.int64 [2]"),
    ("advance", (2, torch.tensor(1, dtype=torch.int32)), "new_lens must be int32 [2], got torch.int32 []"),
    ("advance", (2, torch.tensor([1, 5], dtype=torch.int32)), f"{NEW_LENS} [1, 5]"),
    *(("crop", (x,), f"tokens {WHOLE} {x!r}") for x in (1.0, 1.5, math.nan, None, "1", torch.tensor(1))),
    ("crop", (-1,), "tokens must be at least 0, got -1"),
    *(("crop", (1, x), f"sequence {WHOLE} {x!r}") for x in (0.0, "0", torch.tensor(0))),
    *(("crop", (1, x), f"sequence must be 0 to 1, got {x}") for x in (-1, 2)),
    *(("reserve", (x,), f"tokens {WHOLE} {x!r}") for x in (1.5, math.nan, None, torch.tensor(1))),
    ("reserve", (-1,), "tokens must be at least 0, got -1"),
    *(("reserve", (1, x), f"sequence must be 0 to 1, got {x}") for x in (-1, 2)),
    ("fork", (0, 0), "target must be another sequence than source, got 0 for both"),
    ("fork", (0, 1.0), f"target {WHOLE} 1.0"),
    ("fork", ("0", 1), f"source {WHOLE} '0'"),
    *(("fork", (x, 1), f"source must be 0 to 1, got {x}") for x in (-1, 2)),
    *(("fork", (0, x), f"target must be 0 to 1, got {x}") for x in (-1, 2)),
    *(("free", (x,), f"sequence {WHOLE} {x!r}") for x in (0.0, None)),
    *(("free", (x,), f"sequence must be 0 to 1, got {x}") for x in (-1, 2)),
]


@pytest.mark.parametrize(("method", "arguments", "message"), METHODS, ids=ids(METHODS))
def test_methods(device: str, method: str, arguments: tuple[Any, ...], message: str) -> None:
    cache = PagedKVCache(**RIGHT, device=device)
    cache.advance(5)
    state = [cache.page_table, cache.seq_lens, cache.start_lens, cache.new_lens]
    before = [x.tolist() for x in state]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(cache, method)(*arguments)
    assert [x.tolist() for x in state] == before
    assert cache.lengths == [5, 5]
    assert cache.free_pages == 6
    cache.advance(1)
    assert cache.lengths == [6, 6]


SHAPE = "must have shape [2, 1, 2, 64] to go with q, got"
ATTENTION: list[tuple[str, Any, str]] = [
    *(("scale", x, f"scale must be a finite number, or None, got {x!r}") for x in (math.nan, math.inf, 1e39, "1")),
    ("scale", torch.tensor(0.5), "scale must be a finite number, or None, got tensor(0.5000)"),
    *(("layer", x, f"layer must be 0 to 0, got {x}") for x in (-1, 1)),
    *(("layer", x, f"layer {WHOLE} {x!r}") for x in (0.0, torch.tensor(0))),
    *((key, x, f"{key} must be a tensor, got {x!r}") for key in ("q", "k", "v") for x in (None, [1.0], 1.0)),
    ("q", torch.zeros(()), "q must have shape [B, Hq, D] or [B, T, Hq, D], got []"),
    (
        "q",
        torch.zeros(2, 1, 3, 64),
        "q must have shape [2, 1, a multiple of 2, 64] to go with the cache, got [2, 1, 3, 64]",
    ),
    (
        "q",
        torch.zeros(1, 1, 4, 64),
        "q must have shape [2, 1, a multiple of 2, 64] to go with the cache, got [1, 1, 4, 64]",
    ),
    *(
        (key, torch.zeros(size), f"{key} {SHAPE} {list(size)}")
        for key in ("k", "v")
        for size in ((), (1, 1, 2, 64), (2, 1, 2, 32))
    ),
]


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize(("key", "value", "message"), ATTENTION, ids=ids(ATTENTION))
def test_attention(device: str, key: str, value: Any, message: str, sparse: bool) -> None:
    cache = PagedKVCache(**RIGHT, device=device, dtype=torch.float32)
    for pool in cache.pools:
        pool.zero_()
    cache.advance(1)
    q, k = torch.ones(2, 1, 4, 64, device=device), torch.ones(2, 1, 2, 64, device=device)
    if isinstance(value, Tensor) and key != "scale":
        value = value.to(device)
    if isinstance(value, Tensor) and key == "layer" and device == "cuda":
        message = message.replace(")", ", device='cuda:0')")
    call = {"q": q, "k": k, "v": k, "layer": 0, "config": QuestConfig(32, dense_layers=0 if sparse else 1), key: value}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quest_attention(**call, cache=cache)
    assert not any(pool.any() for pool in cache.pools)
