"""Calls that an operator must refuse, each with the exact sentence of its error.

A sentence names the argument, the requirement and the value found. ``{device}`` stands for the device of the call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from quest_ops import _library, ops
from torch import Tensor

from helpers.operator_cases import KINDS, Case, Shape, place

Arguments = dict[str, Any]
OPERATORS: dict[str, Callable[..., Any]] = {name: getattr(ops, name) for name in _library.OPERATORS}
SCALED = ("append_kv", "update_bounds", "estimate", "decode_step")
CODED = ("append_codes", "rerank_pages")
WRITTEN = ("k_cache", "v_cache", "k_bounds", "k_scales", "k_codes", "code_scales")


def arguments(name: str, device: str, int8: bool = False) -> Arguments:
    """Right arguments of an operator, all given: B = 2, Hq = 4, Hkv = 2, D = 64, S = 16, P = 4, N = 9.

    k_scales is given with 8-bit bounds only. decode_step gets float16, which a single launch supports.
    """
    if int8:
        good = arguments(name, device)
        x = Case(Shape(good["k_bounds"].dtype, lengths=(37, 20), kind=KINDS["minmax-8-bit"])).on(device)
        return {**good, "k_bounds": x.k_bounds, "k_scales": x.k_scales}
    case = Case(Shape(torch.float16 if name == "decode_step" else torch.float32, lengths=(37, 20)))
    x = case.on(device)
    few = place(torch.tensor([2, 1], dtype=torch.int32), "contiguous", device)
    k, v = (place(torch.randn(2, 3, 2, 64), "contiguous", device) for _ in "kv")
    caches = {"k_cache": x.k_cache, "v_cache": x.v_cache, "k_bounds": x.k_bounds}
    paging = {"page_table": x.page_table, "seq_lens": x.seq_lens}
    if name == "append_kv":
        return dict(k=k, v=v, **caches, **paging, new_lens=few)
    if name == "update_bounds":
        return dict(k_cache=x.k_cache, k_bounds=x.k_bounds, **paging, first_token=few)
    if name == "estimate":
        return dict(q=x.q, k_bounds=x.k_bounds, **paging, page_size=16)
    if name == "decode_step":
        k, v = (place(torch.randn(2, 1, 2, 64).half(), "contiguous", device) for _ in "kv")
        before = place(case.seq_lens - 1, "contiguous", device)
        return dict(
            q=x.q, k=k, v=v, **caches, page_table=x.page_table, start_lens=before, seq_lens=x.seq_lens, num_pages=2
        )
    if name == "topk_pages":
        scores = place(torch.randn(2, 4, 4), "contiguous", device)
        return {"scores": scores, "seq_lens": x.seq_lens, "page_size": 16, "k": 3, "num_kv_heads": 2}
    pages = place(case.random_pages(3), "contiguous", device)
    if name in CODED:
        k_codes = place(torch.zeros(9, 2, 16, 16, dtype=torch.uint8), "contiguous", device)
        coded = {"k_codes": k_codes, "code_scales": place(torch.zeros(9, 2, 16), "contiguous", device), **paging}
        return dict(k=k, **coded, new_lens=few) if name == "append_codes" else dict(q=x.q, **coded, pages=pages)
    return dict(q=x.q, k_cache=x.k_cache, v_cache=x.v_cache, **paging, pages=pages)


TENSORS = [(name, key) for name in OPERATORS for key, x in arguments(name, "cpu").items() if isinstance(x, Tensor)]


@dataclass(frozen=True)
class BadInput:
    """A call of an operator with some arguments replaced.

    Attributes:
        operator: its name.
        message: the error's sentence.
        changes: values of arguments; a function gets the right arguments and returns the value.
        int8: whether the other arguments are those of 8-bit bounds.
        by_values: whether numbers in tensors are wrong, which fake tensors do not have.
    """

    operator: str
    message: str
    changes: dict[str, Any]
    int8: bool = False
    by_values: bool = False

    def __str__(self) -> str:
        return f"{self.operator}-{re.sub(r'[^a-z0-9]+', '_', self.message)[:50]}"

    def arguments(self, device: str) -> tuple[Arguments, Arguments]:
        """The right arguments, and those of this call."""
        good = arguments(self.operator, device, self.int8)
        changes = {key: change(good) if callable(change) else change for key, change in self.changes.items()}
        return good, good | changes


def bad(operator: str, message: str, **changes: Any) -> BadInput:
    return BadInput(operator, message, changes)


def bad_int8(operator: str, message: str, **changes: Any) -> BadInput:
    return BadInput(operator, message, changes, int8=True)


def bad_values(operator: str, message: str, **changes: Any) -> BadInput:
    return BadInput(operator, message, changes, by_values=True)


def schema_error(operator: str, key: str, wanted: str) -> str:
    """The start of PyTorch's sentence for a value that does not fit the operator's schema."""
    return f"quest::{operator}() Expected a value of type '{wanted}' for argument '{key}' but instead found type"


def wrong_type(operator: str, key: str, wanted: str, value: object) -> BadInput:
    return bad(operator, f"{schema_error(operator, key, wanted)} '{type(value).__name__}'.", **{key: value})


Change = Callable[[Arguments], Any]


def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Change:
    """A tensor on the device of the other arguments."""
    return lambda good: torch.zeros(size, dtype=dtype, device=good["seq_lens"].device)


def half(*size: int) -> Change:
    return zeros(*size, dtype=torch.float16)


def byte(*size: int) -> Change:
    return zeros(*size, dtype=torch.uint8)


def lens(*size: int) -> Change:
    return zeros(*size, dtype=torch.int32)


def every_second(size: int) -> Change:
    return lambda good: torch.zeros(2 * size, dtype=torch.int32, device=good["seq_lens"].device)[::2]


def long(*size: int) -> Change:
    return lambda good: torch.empty(size[-1], dtype=torch.int32, device=good["seq_lens"].device).expand(size)


def of(key: str, change: Callable[[Tensor], Any]) -> Change:
    """The right tensor of a name, changed."""
    return lambda good: change(good[key])


def with_value(key: str, *place_and_value: int) -> Change:
    """The right tensor of a name with another number in one place."""
    *where, value = place_and_value

    def change(good: Arguments) -> Tensor:
        x = good[key].clone()
        x[tuple(where)] = value
        return x

    return change


def expanded(key: str, dim: int) -> Change:
    """The right tensor of a name with one index repeated along a dimension, without memory for it."""
    return of(key, lambda x: x.narrow(dim, 0, 1).expand(x.shape))


def of_three(key: str) -> Change:
    """The right tensor of a name with two numbers between those of its last dimension."""
    return of(key, lambda x: torch.stack([x] * 3, -1)[..., 0])


#: The largest float32.
MOST = torch.finfo(torch.float32).max
PAGES_OF_Q = (
    "pages must have shape [B, Hs, K] like q's [B, Hq, D] with Hs 2 (a list a KV head) or 4 (a list a query head), got"
)

# Each mistake by itself.
TABLE: list[BadInput] = [
    bad(
        "append_kv",
        "k must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72",
        k=zeros(2, 3, 2, 72),
    ),
    bad(
        "append_kv",
        "v must have shape [B, T, Hkv, D] with 3 in dimension 1 (the shape of k), got [2, 4, 2, 64]",
        v=zeros(2, 4, 2, 64),
    ),
    bad(
        "append_kv",
        "v must have shape [B, T, Hkv, D] with 2 in dimension 2 (the shape of k), got [2, 3, 1, 64]",
        v=zeros(2, 3, 1, 64),
    ),
    bad(
        "append_kv",
        "v must have shape [B, T, Hkv, D] with 64 in dimension 3 (the shape of k), got [2, 3, 2, 80]",
        v=zeros(2, 3, 2, 80),
    ),
    bad(
        "append_kv",
        "v must have shape [B, T, Hkv, D] with 2 in dimension 0 (the shape of k), got [1, 3, 2, 64]",
        v=zeros(1, 3, 2, 64),
    ),
    bad("append_kv", "v must be Float like k, got Half", v=half(2, 3, 2, 64)),
    bad("append_kv", "k_cache must be Float like k, got Half", k_cache=half(9, 2, 16, 64)),
    bad("append_kv", "k must be float32, float16 or bfloat16, got Bool", k=of("k", Tensor.bool)),
    bad("append_kv", "k must be float32, float16 or bfloat16, got ComplexFloat", k=of("k", Tensor.cfloat)),
    bad(
        "append_kv",
        "k_cache must have shape [N, Hkv, S, D] with 2 in dimension 1 (the number of KV heads), got [9, 4, 16, 64]",
        k_cache=zeros(9, 4, 16, 64),
    ),
    bad(
        "append_kv",
        "k_cache must have shape [N, Hkv, S, D] with 64 in dimension 3 (head_dim), got [9, 2, 16, 80]",
        k_cache=zeros(9, 2, 16, 80),
    ),
    bad(
        "append_kv",
        "k_cache's page size (dimension 2) must be 4, 8, 16, 32, 64 or 128, got 12",
        k_cache=zeros(9, 2, 12, 64),
        v_cache=zeros(9, 2, 12, 64),
    ),
    bad(
        "append_kv",
        "v_cache must have shape [N, Hkv, S, D] with 32 in dimension 2 (the page size of k_cache), got [9, 2, 16, 64]",
        k_cache=zeros(9, 2, 32, 64),
    ),
    bad("append_kv", "v_cache must have as many pages as k_cache, 9, got 8", v_cache=zeros(8, 2, 16, 64)),
    bad(
        "append_kv",
        "v_cache must have shape [N, Hkv, S, D] with 16 in dimension 2 (the page size of k_cache), got [9, 2, 32, 64]",
        v_cache=zeros(9, 2, 32, 64),
    ),
    bad(
        "append_kv",
        "v_cache must have shape [N, Hkv, S, D] with 2 in dimension 1 (the number of KV heads), got [9, 1, 16, 64]",
        v_cache=zeros(9, 1, 16, 64),
    ),
    bad(
        "append_kv",
        "v_cache must have shape [N, Hkv, S, D] with 64 in dimension 3 (head_dim), got [9, 2, 16, 128]",
        v_cache=zeros(9, 2, 16, 128),
    ),
    bad("append_kv", "k_bounds must have as many pages as k_cache, 9, got 8", k_bounds=zeros(8, 2, 2, 64)),
    bad(
        "append_kv",
        "k_bounds must have shape [N, Hkv, 2, D] with 2 in dimension 2 (lower and upper), got [9, 2, 3, 64]",
        k_bounds=zeros(9, 2, 3, 64),
    ),
    bad(
        "append_kv",
        "k_bounds must have shape [N, Hkv, 2, D] with 2 in dimension 2 (lower and upper), got [9, 2, 1, 64]",
        k_bounds=zeros(9, 2, 1, 64),
    ),
    bad(
        "append_kv",
        "k_bounds must have shape [N, Hkv, 2, D] with 64 in dimension 3 (head_dim), got [9, 2, 2, 32]",
        k_bounds=zeros(9, 2, 2, 32),
    ),
    bad(
        "append_kv",
        "k_bounds must have shape [N, Hkv, 2, D] with 2 in dimension 1 (the number of KV heads), got [9, 1, 2, 64]",
        k_bounds=zeros(9, 1, 2, 64),
    ),
    bad(
        "append_kv",
        "page_table must have shape [B, P] with 2 in dimension 0 (one row a sequence), got [3, 4]",
        page_table=lens(3, 4),
    ),
    bad(
        "append_kv",
        "page_table's tokens a sequence (P * page_size) must fit in 32 bits, got 2147483648",
        page_table=long(2, 2**27),
    ),
    bad(
        "append_kv",
        "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [3]",
        seq_lens=lens(3),
    ),
    bad(
        "append_kv",
        "new_lens must have shape [B] with 2 in dimension 0 (one number a sequence), got [1]",
        new_lens=lens(1),
    ),
    bad("append_kv", "new_lens must be int32, got Float", new_lens=zeros(2)),
    bad("append_kv", "seq_lens must be int32, got Bool", seq_lens=of("seq_lens", Tensor.bool)),
    bad("append_kv", "k_bounds must be int8 or uint8 where k_scales is given, got Float", k_scales=zeros(9, 2)),
    bad_values(
        "append_kv", "new_lens must be 0 to 3 (T), got -1 for sequence 1", new_lens=with_value("new_lens", 1, -1)
    ),
    bad_values("append_kv", "new_lens must be 0 to 3 (T), got 4 for sequence 0", new_lens=with_value("new_lens", 0, 4)),
    bad_values(
        "append_kv",
        "page_table must have room for seq_lens + new tokens, 64 + 1 for sequence 1, got 4 pages of 16",
        seq_lens=with_value("seq_lens", 1, 64),
    ),
    bad_values(
        "append_kv",
        "page_table must have room for seq_lens + new tokens, 62 + 3 for sequence 1, got 4 pages of 16",
        seq_lens=with_value("seq_lens", 1, 62),
        new_lens=None,
    ),
    bad_values(
        "append_kv",
        "page_table must hold physical pages 0 to 8, got 2147483647 for sequence 1, page 2",
        seq_lens=with_value("seq_lens", 1, 47),
        page_table=with_value("page_table", 1, 3, 9),
        new_lens=None,
    ),
    bad(
        "update_bounds",
        "k_cache must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72",
        k_cache=zeros(9, 2, 16, 72),
    ),
    bad(
        "update_bounds",
        "k_cache's page size (dimension 2) must be 4, 8, 16, 32, 64 or 128, got 12",
        k_cache=zeros(9, 2, 12, 64),
    ),
    bad(
        "update_bounds",
        "k_cache's page size (dimension 2) must be 4, 8, 16, 32, 64 or 128, got 1",
        k_cache=zeros(9, 2, 1, 64),
    ),
    bad(
        "update_bounds",
        "k_cache's page size (dimension 2) must be 4, 8, 16, 32, 64 or 128, got 256",
        k_cache=zeros(9, 2, 256, 64),
    ),
    bad("update_bounds", "k_bounds must have as many pages as k_cache, 9, got 10", k_bounds=zeros(10, 2, 2, 64)),
    bad(
        "update_bounds",
        "k_bounds must have shape [N, Hkv, 2, D] with 2 in dimension 1 (the number of KV heads), got [9, 1, 2, 64]",
        k_bounds=zeros(9, 1, 2, 64),
    ),
    bad("update_bounds", "k_bounds must be Float like k_cache, got Half", k_bounds=half(9, 2, 2, 64)),
    bad(
        "update_bounds",
        "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [1]",
        seq_lens=lens(1),
    ),
    bad(
        "update_bounds",
        "first_token must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
        first_token=lens(3),
    ),
    bad("update_bounds", "first_token must be int32, got Float", first_token=zeros(2)),
    bad(
        "update_bounds",
        "seq_lens must have shape [B] with 3 in dimension 0 (one length a sequence), got [2]",
        page_table=lens(3, 4),
    ),
    bad(
        "update_bounds",
        "page_table's tokens a sequence (P * page_size) must fit in 32 bits, got 2147483648",
        page_table=long(2, 2**27),
    ),
    bad_values(
        "update_bounds",
        "first_token must be at least 0, got -5 for sequence 1",
        first_token=with_value("first_token", 1, -5),
    ),
    bad(
        "estimate", "q must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72", q=zeros(2, 4, 72)
    ),
    bad("estimate", "q's heads must be a positive multiple of k_bounds' heads, got 3 and 2", q=zeros(2, 3, 64)),
    bad("estimate", "q's heads must be a positive multiple of k_bounds' heads, got 0 and 2", q=zeros(2, 0, 64)),
    bad("estimate", "q's heads must be a positive multiple of k_bounds' heads, got 1 and 2", q=zeros(2, 1, 64)),
    bad("estimate", "q must have 1 to 8 new tokens in dimension 1, got 9", q=zeros(2, 9, 4, 64)),
    bad("estimate", "q must have 1 to 8 new tokens in dimension 1, got 0", q=zeros(2, 0, 4, 64)),
    bad(
        "estimate",
        "page_table must have shape [B, P] with 3 in dimension 0 (one row a sequence), got [2, 4]",
        q=zeros(3, 4, 64),
    ),
    bad("estimate", "q must have shape [B, Hq, D] or [B, T, Hq, D], got [2, 64]", q=zeros(2, 64)),
    bad("estimate", "q must have shape [B, Hq, D] or [B, T, Hq, D], got [2, 1, 1, 4, 64]", q=zeros(2, 1, 1, 4, 64)),
    bad("estimate", "k_bounds must be Half like q, got Float", q=half(2, 4, 64)),
    bad(
        "estimate", "q's heads must be a positive multiple of k_bounds' heads, got 4 and 0", k_bounds=zeros(9, 0, 2, 64)
    ),
    bad(
        "estimate",
        "k_bounds must have shape [N, Hkv, 2, D] with 64 in dimension 3 (head_dim), got [9, 2, 2, 80]",
        k_bounds=zeros(9, 2, 2, 80),
    ),
    bad(
        "estimate",
        "k_bounds must have shape [N, Hkv, 2, D] with 2 in dimension 2 (lower and upper), got [9, 2, 1, 64]",
        k_bounds=zeros(9, 2, 1, 64),
    ),
    bad(
        "estimate",
        "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [3]",
        seq_lens=lens(3),
    ),
    bad(
        "estimate",
        "page_table's tokens a sequence (P * page_size) must fit in 32 bits, got 2147483648",
        page_table=long(2, 2**27),
    ),
    bad(
        "estimate",
        "new_lens must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
        new_lens=lens(3),
    ),
    bad("estimate", "new_lens must be int32, got Float", new_lens=zeros(2)),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got 12", page_size=12),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got 0", page_size=0),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got -16", page_size=-16),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got 2", page_size=2),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got 256", page_size=256),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got 1099511627776", page_size=2**40),
    bad("estimate", "page_size must be 4, 8, 16, 32, 64 or 128, got 1", page_size=True),
    bad_values(
        "estimate",
        "new_lens must be 0 to 1 (T), got 2 for sequence 0",
        new_lens=of("seq_lens", lambda x: 2 * torch.ones_like(x)),
    ),
    bad_values(
        "estimate",
        "new_lens must be 0 to 1 (T), got -1 for sequence 0",
        new_lens=of("seq_lens", lambda x: -torch.ones_like(x)),
    ),
    bad("topk_pages", "scores must have 1 to 8 new tokens in dimension 1, got 9", scores=zeros(2, 9, 4, 4)),
    bad("topk_pages", "scores must have 1 to 8 new tokens in dimension 1, got 0", scores=zeros(2, 0, 4, 4)),
    bad("topk_pages", "scores must be float32, got Half", scores=half(2, 4, 4)),
    bad("topk_pages", "scores' heads must be a positive multiple of num_kv_heads, got 5 and 2", scores=zeros(2, 5, 4)),
    bad("topk_pages", "scores' heads must be a positive multiple of num_kv_heads, got 0 and 2", scores=zeros(2, 0, 4)),
    bad("topk_pages", "scores must have shape [B, Hq, P] or [B, T, Hq, P], got [2, 4]", scores=zeros(2, 4)),
    bad(
        "topk_pages",
        "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [3]",
        seq_lens=lens(3),
    ),
    bad(
        "topk_pages",
        "new_lens must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
        new_lens=lens(3),
    ),
    bad(
        "topk_pages",
        "budgets must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
        budgets=lens(3),
    ),
    bad("topk_pages", "budgets must be int32, got Float", budgets=zeros(2)),
    bad("topk_pages", "budgets must have shape [B], got []", budgets=lens()),
    bad("topk_pages", "page_size must be 4, 8, 16, 32, 64 or 128, got 256", page_size=256),
    bad("topk_pages", "page_size must be 4, 8, 16, 32, 64 or 128, got 0", page_size=0),
    bad("topk_pages", "k must be at least 1, got 0", k=0),
    bad("topk_pages", "k must fit in 32 bits, got -1", k=-1),
    bad("topk_pages", "k must fit in 32 bits, got 2147483648", k=2**31),
    bad("topk_pages", "k must fit in 32 bits, got 9223372036854775807", k=2**63 - 1),
    bad("topk_pages", "scores' heads must be a positive multiple of num_kv_heads, got 4 and 3", num_kv_heads=3),
    bad("topk_pages", "scores' heads must be a positive multiple of num_kv_heads, got 4 and 0", num_kv_heads=0),
    bad("topk_pages", "scores' heads must be a positive multiple of num_kv_heads, got 4 and -2", num_kv_heads=-2),
    bad("topk_pages", "scores' heads must be a positive multiple of num_kv_heads, got 4 and 8", num_kv_heads=8),
    bad("topk_pages", "sink_pages must be at least 0, got -1", sink_pages=-1),
    bad("topk_pages", "k must hold the forced pages: sink_pages + recent_pages is 3 + 1, got k = 3", sink_pages=3),
    bad("topk_pages", "recent_pages must be at least 0, got -1", recent_pages=-1),
    bad("topk_pages", "k must hold the forced pages: sink_pages + recent_pages is 0 + 4, got k = 3", recent_pages=4),
    bad(
        "topk_pages",
        "k must hold the forced pages: sink_pages + recent_pages is 0 + 4611686018427387904, got k = 3",
        recent_pages=2**62,
    ),
    bad(
        "append_codes",
        "k must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72",
        k=zeros(2, 3, 2, 72),
    ),
    bad("append_codes", "k must be float32, float16 or bfloat16, got Byte", k=byte(2, 3, 2, 64)),
    bad(
        "append_codes",
        "k_codes must have shape [N, Hkv, S, D / 4] with 1 in dimension 1 (the number of KV heads), got [9, 2, 16, 16]",
        k=zeros(2, 3, 1, 64),
    ),
    bad(
        "append_codes",
        "page_table must have shape [B, P] with 3 in dimension 0 (one row a sequence), got [2, 4]",
        k=zeros(3, 3, 2, 64),
    ),
    bad_values(
        "append_codes", "new_lens must be 0 to 3 (T), got -1 for sequence 1", new_lens=with_value("new_lens", 1, -1)
    ),
    bad_values(
        "append_codes", "new_lens must be 0 to 3 (T), got 4 for sequence 0", new_lens=with_value("new_lens", 0, 4)
    ),
    bad_values(
        "append_codes",
        "page_table must have room for seq_lens + new tokens, 64 + 1 for sequence 1, got 4 pages of 16",
        seq_lens=with_value("seq_lens", 1, 64),
    ),
    bad_values(
        "append_codes",
        "page_table must have room for seq_lens + new tokens, 62 + 3 for sequence 1, got 4 pages of 16",
        seq_lens=with_value("seq_lens", 1, 62),
        new_lens=None,
    ),
    bad_values(
        "append_codes",
        "page_table must hold physical pages 0 to 8, got 2147483647 for sequence 1, page 2",
        seq_lens=with_value("seq_lens", 1, 47),
        page_table=with_value("page_table", 1, 3, 9),
        new_lens=None,
    ),
    bad(
        "rerank_pages",
        "q must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72",
        q=zeros(2, 4, 72),
    ),
    bad("rerank_pages", "q must be float32, float16 or bfloat16, got Char", q=zeros(2, 4, 64, dtype=torch.int8)),
    *(
        bad(
            "rerank_pages",
            f"q's heads must be a positive multiple of k_codes' heads, got {heads} and 2",
            q=zeros(2, heads, 64),
        )
        for heads in (0, 1, 5)
    ),
    *(
        bad("rerank_pages", f"q must have 1 to 8 new tokens in dimension 1, got {T}", q=zeros(2, T, 4, 64))
        for T in (0, 9)
    ),
    bad(
        "rerank_pages",
        "page_table must have shape [B, P] with 3 in dimension 0 (one row a sequence), got [2, 4]",
        q=zeros(3, 4, 64),
    ),
    bad(
        "rerank_pages",
        "q's heads must be a positive multiple of k_codes' heads, got 4 and 0",
        k_codes=byte(9, 0, 16, 16),
    ),
    bad(
        "rerank_pages",
        "pages must have shape [B, T, Hs, K] like q's [B, T, Hq, D], got [2, 2, 3]",
        q=zeros(2, 1, 4, 64),
    ),
    *(
        bad("rerank_pages", f"{PAGES_OF_Q} {list(size)} for q [2, 4, 64]", pages=lens(*size))
        for size in ((2, 3, 3), (1, 2, 3), (2, 0, 3))
    ),
    bad("rerank_pages", "pages must be int32, got Float", pages=zeros(2, 2, 3)),
    bad(
        "rerank_pages",
        "pages' tokens a list (K * page_size) must fit in 32 bits, got 2147483648",
        pages=long(2, 2, 2**27),
    ),
    bad(
        "rerank_pages",
        "pages must have shape [B, Hs, K] like q's [B, Hq, D], got [2, 1, 2, 3]",
        pages=lens(2, 1, 2, 3),
    ),
    bad("rerank_pages", "token_reduce must be one of max, lse, got mean", token_reduce="mean"),
    bad("rerank_pages", "token_reduce must be one of max, lse, got 0", token_reduce=0),
    bad("rerank_pages", "token_reduce must be one of max, lse, got None", token_reduce=None),
    *(
        bad("rerank_pages", f"scale must be above 0, got {scale:g}", scale=scale)
        for scale in (0.0, -1.0, -MOST, 1e-60)  # the last one rounds to 0
    ),
    bad_values(
        "rerank_pages",
        "new_lens must be 0 to 1 (T), got 2 for sequence 0",
        new_lens=of("seq_lens", lambda x: 2 * torch.ones_like(x)),
    ),
    bad_values(
        "rerank_pages",
        "new_lens must be 0 to 1 (T), got -1 for sequence 0",
        new_lens=of("seq_lens", lambda x: -torch.ones_like(x)),
    ),
    bad_values(
        "rerank_pages",
        "pages must hold logical pages 0 to 3, or -1 as padding, got 4 for sequence 1, head 1",
        pages=with_value("pages", 1, 1, 2, 4),
    ),
    bad_values(
        "rerank_pages",
        "pages must hold logical pages 0 to 3, or -1 as padding, got -2 for sequence 0, head 1",
        pages=with_value("pages", 0, 1, 0, -2),
    ),
    bad_values(
        "rerank_pages",
        "pages must hold logical pages 0 to 3, or -1 as padding, got 2147483647 for sequence 0, head 0",
        pages=with_value("pages", 0, 0, 0, 2**31 - 1),
    ),
    bad_values(
        "topk_pages",
        "new_lens must be 0 to 1 (T), got 2 for sequence 0",
        new_lens=of("seq_lens", lambda x: 2 * torch.ones_like(x)),
    ),
    bad_values(
        "topk_pages",
        "new_lens must be 0 to 1 (T), got -1 for sequence 0",
        new_lens=of("seq_lens", lambda x: -torch.ones_like(x)),
    ),
    bad(
        "sparse_decode",
        "q must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72",
        q=zeros(2, 4, 72),
    ),
    bad("sparse_decode", "q's heads must be a positive multiple of k_cache's heads, got 5 and 2", q=zeros(2, 5, 64)),
    bad("sparse_decode", "q's heads must be a positive multiple of k_cache's heads, got 1 and 2", q=zeros(2, 1, 64)),
    bad("sparse_decode", "q's heads must be a positive multiple of k_cache's heads, got 0 and 2", q=zeros(2, 0, 64)),
    bad("sparse_decode", "q must have 1 to 8 new tokens in dimension 1, got 9", q=zeros(2, 9, 4, 64)),
    bad(
        "sparse_decode",
        "pages must have shape [B, T, Hs, K] like q's [B, T, Hq, D], got [2, 2, 3]",
        q=zeros(2, 1, 4, 64),
    ),
    bad(
        "sparse_decode",
        "page_table must have shape [B, P] with 3 in dimension 0 (one row a sequence), got [2, 4]",
        q=zeros(3, 4, 64),
    ),
    bad("sparse_decode", "k_cache must be Half like q, got Float", q=half(2, 4, 64)),
    bad(
        "sparse_decode",
        "k_cache must have shape [N, Hkv, S, D] with 64 in dimension 3 (head_dim), got [9, 2, 16, 80]",
        k_cache=zeros(9, 2, 16, 80),
    ),
    bad(
        "sparse_decode",
        "q's heads must be a positive multiple of k_cache's heads, got 4 and 0",
        k_cache=zeros(9, 0, 16, 64),
    ),
    bad("sparse_decode", "k_cache must be Float like q, got Half", k_cache=half(9, 2, 16, 64)),
    bad(
        "sparse_decode",
        "k_cache's page size (dimension 2) must be 4, 8, 16, 32, 64 or 128, got 12",
        k_cache=zeros(9, 2, 12, 64),
        v_cache=zeros(9, 2, 12, 64),
    ),
    bad("sparse_decode", "v_cache must have as many pages as k_cache, 9, got 8", v_cache=zeros(8, 2, 16, 64)),
    bad(
        "sparse_decode",
        "v_cache must have shape [N, Hkv, S, D] with 16 in dimension 2 (the page size of k_cache), got [9, 2, 8, 64]",
        v_cache=zeros(9, 2, 8, 64),
    ),
    bad(
        "sparse_decode",
        "v_cache must have shape [N, Hkv, S, D] with 2 in dimension 1 (the number of KV heads), got [9, 4, 16, 64]",
        v_cache=zeros(9, 4, 16, 64),
    ),
    bad(
        "sparse_decode",
        "v_cache must have shape [N, Hkv, S, D] with 64 in dimension 3 (head_dim), got [9, 2, 16, 80]",
        v_cache=zeros(9, 2, 16, 80),
    ),
    bad(
        "sparse_decode",
        "page_table must have shape [B, P] with 2 in dimension 0 (one row a sequence), got [1, 4]",
        page_table=lens(1, 4),
    ),
    bad(
        "sparse_decode",
        "page_table's tokens a sequence (P * page_size) must fit in 32 bits, got 2147483648",
        page_table=long(2, 2**27),
    ),
    bad(
        "sparse_decode",
        "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [1]",
        seq_lens=lens(1),
    ),
    bad(
        "sparse_decode",
        "new_lens must have shape [B] with 2 in dimension 0 (one number a sequence), got [1]",
        new_lens=lens(1),
    ),
    bad(
        "sparse_decode",
        f"{PAGES_OF_Q} [2, 3, 3] for q [2, 4, 64]",
        pages=lens(2, 3, 3),
    ),
    bad(
        "sparse_decode",
        f"{PAGES_OF_Q} [1, 2, 3] for q [2, 4, 64]",
        pages=lens(1, 2, 3),
    ),
    bad(
        "sparse_decode",
        f"{PAGES_OF_Q} [2, 0, 3] for q [2, 4, 64]",
        pages=lens(2, 0, 3),
    ),
    bad("sparse_decode", "pages must be int32, got Float", pages=zeros(2, 2, 3)),
    bad(
        "sparse_decode",
        "pages' tokens a list (K * page_size) must fit in 32 bits, got 2147483648",
        pages=long(2, 2, 2**27),
    ),
    bad(
        "sparse_decode",
        "pages must have shape [B, Hs, K] like q's [B, Hq, D], got [2, 1, 2, 3]",
        pages=lens(2, 1, 2, 3),
    ),
    bad_values(
        "sparse_decode",
        "new_lens must be 0 to 1 (T), got 2 for sequence 0",
        new_lens=of("seq_lens", lambda x: 2 * torch.ones_like(x)),
    ),
    bad_values(
        "sparse_decode",
        "new_lens must be 0 to 1 (T), got -1 for sequence 0",
        new_lens=of("seq_lens", lambda x: -torch.ones_like(x)),
    ),
    bad_values(
        "sparse_decode",
        "pages must hold logical pages 0 to 3, or -1 as padding, got 4 for sequence 1, head 1",
        pages=with_value("pages", 1, 1, 2, 4),
    ),
    bad_values(
        "sparse_decode",
        "pages must hold logical pages 0 to 3, or -1 as padding, got -2 for sequence 0, head 1",
        pages=with_value("pages", 0, 1, 0, -2),
    ),
    bad_values(
        "sparse_decode",
        "pages must hold logical pages 0 to 3, or -1 as padding, got 2147483647 for sequence 0, head 0",
        pages=with_value("pages", 0, 0, 0, 2**31 - 1),
    ),
    bad(
        "decode_step",
        "q must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72",
        q=half(2, 4, 72),
    ),
    bad("decode_step", "q's heads must be a positive multiple of k_cache's heads, got 5 and 2", q=half(2, 5, 64)),
    bad("decode_step", "q's heads must be a positive multiple of k_cache's heads, got 0 and 2", q=half(2, 0, 64)),
    bad("decode_step", "q must have 1 to 8 new tokens in dimension 1, got 9", q=half(2, 9, 4, 64)),
    bad(
        "decode_step",
        "k must have shape [B, T, Hkv, D] with 2 in dimension 1 (the new tokens of q), got [2, 1, 2, 64]",
        q=half(2, 2, 4, 64),
    ),
    bad(
        "decode_step",
        "page_table must have shape [B, P] with 3 in dimension 0 (one row a sequence), got [2, 4]",
        q=half(3, 4, 64),
    ),
    bad("decode_step", "k_cache must be Float like q, got Half", q=zeros(2, 4, 64)),
    bad(
        "decode_step",
        "k must have shape [B, T, Hkv, D] with 2 in dimension 0 (the number of sequences), got [3, 1, 2, 64]",
        k=half(3, 1, 2, 64),
    ),
    bad(
        "decode_step",
        "k must have shape [B, T, Hkv, D] with 1 in dimension 1 (the new tokens of q), got [2, 2, 2, 64]",
        k=half(2, 2, 2, 64),
    ),
    bad(
        "decode_step",
        "v must have shape [B, T, Hkv, D] with 4 in dimension 2 (the shape of k), got [2, 1, 2, 64]",
        k=half(2, 1, 4, 64),
    ),
    bad("decode_step", "k must be Half like q, got Float", k=zeros(2, 1, 2, 64)),
    bad("decode_step", "k must have shape [B, T, Hkv, D], got [2, 2, 64]", k=half(2, 2, 64)),
    bad(
        "decode_step",
        "v must have shape [B, T, Hkv, D] with 2 in dimension 2 (the shape of k), got [2, 1, 4, 64]",
        v=half(2, 1, 4, 64),
    ),
    bad(
        "decode_step",
        "v must have shape [B, T, Hkv, D] with 64 in dimension 3 (the shape of k), got [2, 1, 2, 80]",
        v=half(2, 1, 2, 80),
    ),
    bad(
        "decode_step",
        "k_cache must have shape [N, Hkv, S, D] with 64 in dimension 3 (head_dim), got [9, 2, 16, 80]",
        k_cache=half(9, 2, 16, 80),
    ),
    bad("decode_step", "v_cache must have as many pages as k_cache, 9, got 8", v_cache=half(8, 2, 16, 64)),
    bad(
        "decode_step",
        "v_cache must have shape [N, Hkv, S, D] with 16 in dimension 2 (the page size of k_cache), got [9, 2, 32, 64]",
        v_cache=half(9, 2, 32, 64),
    ),
    bad("decode_step", "k_bounds must have as many pages as k_cache, 9, got 8", k_bounds=half(8, 2, 2, 64)),
    bad(
        "decode_step",
        "k_bounds must have shape [N, Hkv, 2, D] with 2 in dimension 2 (lower and upper), got [9, 2, 3, 64]",
        k_bounds=half(9, 2, 3, 64),
    ),
    bad("decode_step", "k_bounds must be Half like k, got Float", k_bounds=zeros(9, 2, 2, 64)),
    bad(
        "decode_step",
        "page_table must have shape [B, P] with 2 in dimension 0 (one row a sequence), got [3, 4]",
        page_table=lens(3, 4),
    ),
    bad(
        "decode_step",
        "page_table's tokens a sequence (P * page_size) must fit in 32 bits, got 2147483648",
        page_table=long(2, 2**27),
    ),
    bad(
        "decode_step",
        "start_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [3]",
        start_lens=lens(3),
    ),
    bad(
        "decode_step",
        "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [3]",
        seq_lens=lens(3),
    ),
    bad(
        "decode_step",
        "new_lens must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
        new_lens=lens(3),
    ),
    bad(
        "decode_step",
        "budgets must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
        budgets=lens(3),
    ),
    bad("decode_step", "budgets must be int32, got Float", budgets=zeros(2)),
    bad("decode_step", "counters must be int32, got Float", counters=zeros(48)),
    bad("decode_step", "counters must have shape [count], got [2, 24]", counters=lens(2, 24)),
    bad("decode_step", "counters must have at least 32 + 4 * B * Hkv = 48 numbers, got 47", counters=lens(47)),
    bad("decode_step", "counters must have stride 1 in its last dimension, got 2", counters=every_second(48)),
    bad("decode_step", "reselect_every must be at least 1 and fit in 32 bits, got 0", reselect_every=0),
    bad("decode_step", "reselect_every must be at least 1 and fit in 32 bits, got 2147483648", reselect_every=2**31),
    bad(
        "decode_step",
        "kept_pages and kept_steps must be given together, got kept_pages alone",
        kept_pages=lens(2, 2, 3),
    ),
    bad("decode_step", "kept_pages and kept_steps must be given together, got kept_steps alone", kept_steps=lens(2)),
    *(
        bad("decode_step", sentence, **{"kept_pages": lens(2, 2, 3), "kept_steps": lens(2), **changes})
        for sentence, changes in (
            ("kept_pages must be int32, got Float", {"kept_pages": zeros(2, 2, 3)}),
            ("kept_pages must have shape [B, Hs, K or more], got [2, 3]", {"kept_pages": lens(2, 3)}),
            (
                "kept_pages must have shape [B, Hs, K or more] with 2 in dimension 0 (the number of sequences), "
                "got [1, 2, 3]",
                {"kept_pages": lens(1, 2, 3)},
            ),
            (
                "kept_pages must have shape [B, Hs, K or more] with 2 in dimension 1 (a list for each selecting head), "
                "got [2, 4, 3]",
                {"kept_pages": lens(2, 4, 3)},
            ),
            (
                "kept_pages must have shape [B, Hs, K or more] with K = 2 in dimension 2, got [2, 2, 1]",
                {"kept_pages": lens(2, 2, 1)},
            ),
            (
                "kept_pages must have shape [B, Hs, K or more] with K = 4 in dimension 2, got [2, 2, 3]",
                {"dense_below": 49},
            ),
            (
                "kept_pages must be left out with a num_pages of 0, which reads every page",
                {"num_pages": 0},
            ),
            (
                "kept_pages must be contiguous, got strides that are not",
                {"kept_pages": lambda good: lens(2, 2, 4)(good)[..., :3]},
            ),
            ("recent_pages must be at least 1 with kept_pages, got 0", {"recent_pages": 0}),
            ("kept_steps must be int32, got Float", {"kept_steps": zeros(2)}),
            (
                "kept_steps must have shape [B] with 2 in dimension 0 (one number a sequence), got [3]",
                {"kept_steps": lens(3)},
            ),
        )
    ),
    bad("decode_step", "num_pages must fit in 32 bits, got -1", num_pages=-1),
    bad("decode_step", "num_pages must fit in 32 bits, got 2147483648", num_pages=2**31),
    bad(
        "decode_step",
        "num_pages' tokens a list (num_pages * page_size) must fit in 32 bits, got 2147483648",
        num_pages=2**27,
    ),
    bad("decode_step", "sink_pages must be at least 0, got -1", sink_pages=-1),
    bad(
        "decode_step",
        "num_pages must hold the forced pages: sink_pages + recent_pages is 2 + 1, got num_pages = 2",
        sink_pages=2,
    ),
    bad("decode_step", "recent_pages must be at least 0, got -1", recent_pages=-1),
    bad(
        "decode_step",
        "num_pages must hold the forced pages: sink_pages + recent_pages is 0 + 3, got num_pages = 2",
        recent_pages=3,
    ),
    bad(
        "decode_step",
        "budgets must be left out with a num_pages of 0, which reads every page",
        num_pages=0,
        budgets=lens(2),
    ),
    bad("decode_step", "sink_pages must be at least 0, got -1", num_pages=0, sink_pages=-1),
    bad("decode_step", "recent_pages must be at least 0, got -1", num_pages=0, recent_pages=-1),
    bad("decode_step", "dense_below must fit in 32 bits, got -1", num_pages=0, dense_below=-1),
    *(
        bad(name, f"dense_below {sentence}", dense_below=tokens)
        for name in ("topk_pages", "decode_step")
        for sentence, tokens in (
            ("must fit in 32 bits, got -1", -1),
            ("must fit in 32 bits, got 2147483648", 2**31),
            ("in whole pages must fit in 32 bits, got 2147483648", 2**31 - 1),
            ("in whole pages must fit in 32 bits, got 2147483648", 2**31 - 15),
        )
    ),
    bad_values(
        "decode_step",
        "start_lens must be 0 to 64 (P * page_size), got -1 for sequence 1",
        start_lens=with_value("start_lens", 1, -1),
    ),
    bad_values(
        "decode_step",
        "start_lens must be 0 to 64 (P * page_size), got 65 for sequence 1",
        start_lens=with_value("start_lens", 1, 65),
    ),
    bad_values(
        "decode_step",
        "start_lens must be 0 to 64 (P * page_size), got 2147483647 for sequence 1",
        start_lens=with_value("start_lens", 1, 2**31 - 1),
    ),
    bad_values(
        "decode_step",
        "page_table must hold physical pages 0 to 8, got 9 for sequence 1, page 0",
        page_table=with_value("page_table", 1, 0, 9),
    ),
    bad_values(
        "decode_step",
        "seq_lens must be start_lens + T, 19 + 1 for sequence 1, got 21",
        seq_lens=with_value("seq_lens", 1, 21),
    ),
    bad_values(
        "decode_step",
        "seq_lens must be start_lens + T, 19 + 1 for sequence 1, got 0",
        seq_lens=with_value("seq_lens", 1, 0),
    ),
    bad_values(
        "decode_step",
        "seq_lens must be start_lens + T, 35 + 1 for sequence 0, got 37",
        start_lens=with_value("start_lens", 0, 35),
    ),
    bad_values(
        "decode_step", "seq_lens must be start_lens + new_lens, 36 + 0 for sequence 0, got 37", new_lens=lens(2)
    ),
    bad_values(
        "decode_step",
        "new_lens must be 0 to 1 (T), got 2 for sequence 0",
        new_lens=of("seq_lens", lambda x: 2 * torch.ones_like(x)),
    ),
    bad_values(
        "decode_step",
        "new_lens must be 0 to 1 (T), got -1 for sequence 0",
        new_lens=of("seq_lens", lambda x: -torch.ones_like(x)),
    ),
    bad(
        "append_kv",
        "v_cache must have memory of its own, since it is written to, got that of k_cache",
        v_cache=of("k_cache", lambda x: x),
    ),
    bad(
        "decode_step",
        "v_cache must have memory of its own, since it is written to, got that of k_cache",
        v_cache=of("k_cache", lambda x: x),
    ),
    wrong_type("estimate", "q", "Tensor", 1.0),
    wrong_type("estimate", "q", "Tensor", [1.0]),
    wrong_type("estimate", "seq_lens", "Tensor", 37),
    wrong_type("estimate", "seq_lens", "Tensor", [37, 20]),
    wrong_type("topk_pages", "budgets", "Optional[Tensor]", 2),
    wrong_type("topk_pages", "budgets", "Optional[Tensor]", 2.0),
    wrong_type("decode_step", "budgets", "Optional[Tensor]", 1.5),
    wrong_type("decode_step", "counters", "Optional[Tensor]", 48),
    wrong_type("decode_step", "kept_pages", "Optional[Tensor]", 3),
    wrong_type("decode_step", "kept_steps", "Optional[Tensor]", 1),
    wrong_type("append_codes", "new_lens", "Optional[Tensor]", 1),
    wrong_type("rerank_pages", "pages", "Tensor", 3),
    wrong_type("sparse_decode", "pages", "Optional[Tensor]", 3),
    wrong_type("update_bounds", "first_token", "Optional[Tensor]", 0),
    wrong_type("append_kv", "new_lens", "Optional[Tensor]", 1),
]


# Families: the same mistake in each argument where it can be made.

SHAPES = {
    "k": "[B, T, Hkv, D]",
    "v": "[B, T, Hkv, D]",
    "k_cache": "[N, Hkv, S, D]",
    "v_cache": "[N, Hkv, S, D]",
    "k_bounds": "[N, Hkv, 2, D]",
    "k_codes": "[N, Hkv, S, D / 4]",
    "code_scales": "[N, Hkv, S]",
    "page_table": "[B, P]",
    "seq_lens": "[B]",
    "start_lens": "[B]",
    "new_lens": "[B]",
    "first_token": "[B]",
    "q": "[B, Hq, D] or [B, T, Hq, D]",
    "scores": "[B, Hq, P] or [B, T, Hq, P]",
    "pages": "[B, Hs, K] like q's [B, Hq, D]",
}
OPTIONAL = ("pages", "new_lens", "first_token")
ANY_STRIDES = ("code_scales",)
#: The tensor that others must be like.
FIRST = {
    "append_kv": "k",
    "update_bounds": "k_cache",
    "estimate": "q",
    "topk_pages": "scores",
    "append_codes": "k",
    "rerank_pages": "q",
    "sparse_decode": "q",
    "decode_step": "q",
}
#: The numbers that an operator takes, by their type in the schema.
NUMBERS = [
    ("append_kv", "std_factor", "Optional[float]"),
    ("update_bounds", "std_factor", "Optional[float]"),
    ("estimate", "page_size", "int"),
    *(("topk_pages", key, "int") for key in ("page_size", "k", "num_kv_heads", "sink_pages", "recent_pages")),
    *((name, "dense_below", "int") for name in ("topk_pages", "decode_step")),
    ("topk_pages", "scale", "float"),
    ("rerank_pages", "scale", "float"),
    ("sparse_decode", "scale", "Optional[float]"),
    *(("decode_step", key, "int") for key in ("num_pages", "sink_pages", "recent_pages", "reselect_every")),
    ("decode_step", "scale", "Optional[float]"),
    ("decode_step", "std_factor", "Optional[float]"),
]
WRITES = [
    *(("append_kv", key) for key in ("k_cache", "v_cache", "k_bounds")),
    ("update_bounds", "k_bounds"),
    *(("append_codes", key) for key in ("k_codes", "code_scales")),
    *(("decode_step", key) for key in ("k_cache", "v_cache", "k_bounds")),
]
#: One tensor of each operator.
LAYOUTS = [
    ("append_kv", "k_cache"),
    ("update_bounds", "k_bounds"),
    ("estimate", "seq_lens"),
    ("topk_pages", "seq_lens"),
    ("append_codes", "k_codes"),
    ("rerank_pages", "code_scales"),
    ("sparse_decode", "pages"),
    ("decode_step", "page_table"),
]
OWN_MEMORY = "must have memory of its own for each element, since it is written to, got stride 0 in dimension"
NO_GRADIENT = (
    "must not require a gradient, since it is written to: quest_ops is for decoding. Call it under torch.no_grad() or "
    "torch.inference_mode(), or detach"
)


def requiring_grad(key: str) -> Change:
    return of(key, lambda x: x.clone().requires_grad_())


def _properties(name: str, key: str) -> list[BadInput]:
    """A tensor of another dtype, number of dimensions or last stride, and None."""
    good = arguments(name, "cpu")[key]
    first = FIRST[name]
    dtype = "int32, got Long"
    if good.is_floating_point():
        like = {torch.float32: "Float", torch.float16: "Half"}[good.dtype]
        dtype = f"{like} like {'k' if name == 'decode_step' and key in ('v', 'k_bounds') else first}, got Double"
        if key == first:
            dtype = ("float32" if name == "topk_pages" else "float32, float16 or bfloat16") + ", got Double"
    dtype = {"k_codes": "uint8, got Long", "code_scales": "float32, got Double"}.get(key, dtype)
    rows = [
        bad(
            name, f"{key} must be {dtype}", **{key: of(key, Tensor.double if good.is_floating_point() else Tensor.long)}
        ),
        bad(name, f"{key} must have shape {SHAPES[key]}, got []", **{key: of(key, lambda x: x.flatten()[0])}),
        bad(
            name,
            f"{key} must have shape {SHAPES[key]}, got {[1, 1, 1, *good.shape]}",
            **{key: of(key, lambda x: x[None, None, None])},
        ),
    ]
    if key not in ANY_STRIDES:
        rows.append(bad(name, f"{key} must have stride 1 in its last dimension, got 3", **{key: of_three(key)}))
    if key not in OPTIONAL or (name, key) == ("rerank_pages", "pages"):
        rows.append(bad(name, f"{key} must be a tensor, got None", **{key: None}))
    return rows


def _layouts(name: str, key: str) -> list[BadInput]:
    """Tensors that are no strided memory, or on the meta device."""
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "layout torch.sparse_coo": Tensor.to_sparse,
        "a negative view: call resolve_neg() on it": torch._neg_view,
        "a conjugate view: call resolve_conj() on it": lambda x: x.cfloat().conj(),
        "a quantized tensor (torch.qint8)": lambda x: torch.quantize_per_tensor(x.cpu().float(), 1.0, 0, torch.qint8),
        "a nested tensor": lambda x: torch.nested.as_nested_tensor(list(x)),
        "a tensor of zeros without memory": lambda x: torch._efficientzerotensor(
            x.shape, dtype=x.dtype, device=x.device
        ),
    }
    rows = [
        bad(name, f"{key} must be a strided tensor, got {got}", **{key: of(key, make)}) for got, make in layouts.items()
    ]
    like = FIRST[name]
    message = f"{key} must be on {{device}} like {like}, got meta"
    return [*rows, bad(name, message, **{key: of(key, lambda x: x.to("meta"))})]


def _numbers(name: str, key: str, kind: str) -> list[BadInput]:
    """A tensor, text, or a number of another kind in place of a number."""
    rows = [
        bad(name, f"{key} must be a number, got a tensor of shape []", **{key: zeros()}),
        bad(name, f"{key} must be a number, got a tensor of shape [2]", **{key: lens(2)}),
        wrong_type(name, key, kind, "1"),
    ]
    if kind == "int":
        rows.append(wrong_type(name, key, kind, 2.0))
    if not kind.startswith("Optional"):
        rows.append(wrong_type(name, key, kind, None))
    if key == "scale":
        values = (math.nan, math.inf, -math.inf, 1e39)
        rows += [bad(name, f"scale must be a finite number, got {value:g}", scale=value) for value in values]
    if key == "std_factor":
        message = "std_factor must be a finite number of at least 0, or None for minimum and maximum, got"
        values = (-1.0, -1e-9, math.inf, math.nan, 1e39)
        rows += [bad(name, f"{message} {value:g}", std_factor=value) for value in values]
    return rows


def _written(name: str, key: str, int8: bool) -> list[BadInput]:
    """Written tensors that share memory, or require a gradient."""
    leading = 2 if key == "k_scales" else 3
    rows = [(f"{key} {OWN_MEMORY} {dim}", expanded(key, dim)) for dim in range(leading)]
    if key != "k_codes":  # whole numbers have no gradient
        rows.append((f"{key} {NO_GRADIENT} {key}", requiring_grad(key)))
    return [BadInput(name, message, {key: change}, int8) for message, change in rows]


def _scaled(name: str) -> list[BadInput]:
    """Bounds of 8 or 4 bits, and their scales."""
    byte = of("k_bounds", lambda x: x.to(torch.uint8))
    like, shape = "k" if name == "decode_step" else FIRST[name], "k_scales must have shape [N, Hkv]"
    bounds = "k_bounds must have shape [N, Hkv, 2, D]"
    return [
        bad(
            name,
            "k_bounds must be int8 or uint8 where k_scales is given, got "
            + {torch.float16: "Half", torch.float32: "Float"}[arguments(name, "cpu")["k_bounds"].dtype],
            k_scales=zeros(9, 2),
        ),
        bad_int8(
            name,
            "k_bounds must be int8 or uint8 where k_scales is given, got Float",
            k_bounds=of("k_bounds", Tensor.float),
        ),
        bad_int8(name, "k_bounds of int8 needs k_scales, got none", k_scales=None),
        bad_int8(name, "k_bounds of uint8 needs k_scales, got none", k_bounds=byte, k_scales=None),
        bad_int8(
            name,
            "k_bounds must have shape [N, Hkv, 2, D / 2] with 32 in dimension 3 (head_dim, two dimensions a byte), "
            "got [9, 2, 2, 64]",
            k_bounds=byte,
        ),
        bad_int8(
            name,
            f"{bounds} with 2 in dimension 2 (lower and upper), got [9, 2, 1, 64]",
            k_bounds=of("k_bounds", lambda x: x[:, :, :1]),
        ),
        bad_int8(
            name,
            f"{bounds} with 64 in dimension 3 (head_dim), got [9, 2, 2, 32]",
            k_bounds=of("k_bounds", lambda x: x[..., :32]),
        ),
        bad_int8(name, f"{bounds}, got []", k_bounds=of("k_bounds", lambda x: x.flatten()[0])),
        bad_int8(name, "k_bounds must have stride 1 in its last dimension, got 3", k_bounds=of_three("k_bounds")),
        bad_int8(
            name,
            f"k_bounds must be on {{device}} like {like}, got meta",
            k_bounds=of("k_bounds", lambda x: x.to("meta")),
        ),
        bad_int8(name, "k_scales must be float32, got Half", k_scales=of("k_scales", Tensor.half)),
        bad_int8(name, f"{shape} with 9 in dimension 0 (the pages of k_bounds), got [10, 2]", k_scales=zeros(10, 2)),
        bad_int8(name, f"{shape} with 2 in dimension 1 (the number of KV heads), got [9, 1]", k_scales=zeros(9, 1)),
        bad_int8(name, f"{shape}, got [9, 2, 1]", k_scales=zeros(9, 2, 1)),
        bad_int8(name, f"{shape}, got []", k_scales=zeros()),
        bad_int8(
            name,
            f"k_scales must be on {{device}} like {like}, got meta",
            k_scales=of("k_scales", lambda x: x.to("meta")),
        ),
        wrong_type(name, "k_scales", "Optional[Tensor]", 1.0),
    ]


def _coded(name: str) -> list[BadInput]:
    """Codes and their scales."""
    codes, scales = "k_codes must have shape [N, Hkv, S, D / 4]", "code_scales must have shape [N, Hkv, S]"
    like, of_codes = FIRST[name], "(the tokens of k_codes), got"
    size = "k_codes' page size (dimension 2) must be 4, 8, 16, 32, 64 or 128, got"
    bytes_ = f"{codes} with 16 in dimension 3 (head_dim, four dimensions a byte), got"
    return [
        bad(name, "k_codes must be uint8, got Char", k_codes=of("k_codes", lambda x: x.to(torch.int8))),
        bad(name, f"{bytes_} [9, 2, 16, 64]", k_codes=byte(9, 2, 16, 64)),
        bad(name, f"{bytes_} [9, 2, 16, 15]", k_codes=byte(9, 2, 16, 15)),
        *(bad(name, f"{size} {S}", k_codes=byte(9, 2, S, 16), code_scales=zeros(9, 2, S)) for S in (0, 1, 12, 256)),
        bad(name, "code_scales must be float32, got Half", code_scales=half(9, 2, 16)),
        bad(name, f"{scales} with 9 in dimension 0 {of_codes} [8, 2, 16]", code_scales=zeros(8, 2, 16)),
        bad(name, f"{scales} with 2 in dimension 1 {of_codes} [9, 1, 16]", code_scales=zeros(9, 1, 16)),
        bad(name, f"{scales} with 16 in dimension 2 {of_codes} [9, 2, 32]", code_scales=zeros(9, 2, 32)),
        bad(name, f"{scales} with 10 in dimension 0 {of_codes} [9, 2, 16]", k_codes=byte(10, 2, 16, 16)),
        *(
            bad(name, f"{key} must be on {{device}} like {like}, got meta", **{key: of(key, lambda x: x.to("meta"))})
            for key in ("k_codes", "code_scales")
        ),
        bad(
            name,
            "page_table must have shape [B, P] with 2 in dimension 0 (one row a sequence), got [3, 4]",
            page_table=lens(3, 4),
        ),
        bad(
            name,
            "page_table's tokens a sequence (P * page_size) must fit in 32 bits, got 2147483648",
            page_table=long(2, 2**27),
        ),
        bad(
            name,
            "seq_lens must have shape [B] with 2 in dimension 0 (one length a sequence), got [3]",
            seq_lens=lens(3),
        ),
        bad(
            name,
            "new_lens must have shape [B] with 2 in dimension 0 (one number a sequence), got [1]",
            new_lens=lens(1),
        ),
        bad(name, "new_lens must be int32, got Float", new_lens=zeros(2)),
        wrong_type(name, "code_scales", "Tensor", 1.0),
    ]


def _lengths_and_pages(name: str) -> list[BadInput]:
    rows = [
        bad_values(
            name,
            f"seq_lens must be 0 to 64 (P * page_size), got {value} for sequence 1",
            seq_lens=with_value("seq_lens", 1, value),
        )
        for value in (-1, 65, 2**31 - 1, -(2**31))
    ]
    if name != "topk_pages":
        rows += [
            bad_values(
                name,
                f"page_table must hold physical pages 0 to 8, got {value} for sequence 0, page 2",
                page_table=with_value("page_table", 0, 2, value),
            )
            for value in (-1, 9, 2**31 - 1, -(2**31))
        ]
    return rows


FAMILIES: list[BadInput] = [
    *(row for name, key in TENSORS for row in _properties(name, key)),
    *(row for name, key in LAYOUTS for row in _layouts(name, key)),
    *(row for number in NUMBERS for row in _numbers(*number)),
    *(row for name, key in WRITES for row in _written(name, key, int8=False)),
    *(row for name in ("append_kv", "update_bounds", "decode_step") for row in _written(name, "k_scales", int8=True)),
    *(row for name in SCALED for row in _scaled(name)),
    *(row for name in CODED for row in _coded(name)),
    *(row for name in OPERATORS for row in _lengths_and_pages(name)),
]

BAD_INPUTS = TABLE + FAMILIES


def full(key: str, value: float) -> Change:
    """The right tensor of a name with one number everywhere."""
    return of(key, lambda x: torch.full_like(x, value))


def whole_table(good: Arguments) -> Tensor:
    """All pages of both sequences; the right table has those in use."""
    return torch.arange(8, dtype=torch.int32, device=good["seq_lens"].device).view(2, 4)


def of_three_of(*size: int) -> Change:
    """Zeros with two numbers between those of the last dimension."""
    return lambda good: zeros(*size, 3)(good)[..., 0]


#: Calls at the limits, which are accepted.
ACCEPTED: list[BadInput] = [
    *(bad(name, "") for name in OPERATORS),
    *(bad_int8(name, "") for name in SCALED),
    *(bad(name, "", seq_lens=full("seq_lens", 0)) for name in OPERATORS if name != "decode_step"),
    *(
        bad(name, "", seq_lens=full("seq_lens", 64), page_table=whole_table)
        for name in ("update_bounds", "estimate", "rerank_pages", "sparse_decode")
    ),
    *(
        bad(name, "", page_table=full("page_table", page))
        for name in ("estimate", "rerank_pages", "sparse_decode")
        for page in (0, 8)
    ),
    *(bad("append_kv", "", std_factor=factor) for factor in (0.0, MOST)),
    bad("append_kv", "", seq_lens=full("seq_lens", 64), new_lens=full("new_lens", 0)),
    bad("append_kv", "", seq_lens=full("seq_lens", 61), new_lens=full("new_lens", 3), page_table=whole_table),
    bad(
        "append_kv",
        "",
        k_cache=of("k_cache", lambda x: x[:0]),
        v_cache=of("v_cache", lambda x: x[:0]),
        k_bounds=of("k_bounds", lambda x: x[:0]),
        new_lens=full("new_lens", 0),
    ),
    bad("append_kv", "", k=zeros(2, 0, 2, 64), v=zeros(2, 0, 2, 64), new_lens=full("new_lens", 0)),
    *(
        bad(
            "append_kv",
            "",
            k_cache=zeros(9, 2, S, 64),
            v_cache=zeros(9, 2, S, 64),
            seq_lens=full("seq_lens", 0),
            page_table=full("page_table", 0),
        )
        for S in (4, 128)
    ),
    # The stride of a dimension of one element means nothing.
    bad(
        "append_kv",
        "",
        k=zeros(2, 3, 1, 64),
        v=zeros(2, 3, 1, 64),
        k_cache=lambda good: zeros(9, 1, 16, 64)(good).as_strided((9, 1, 16, 64), (1024, 0, 64, 1)),
        v_cache=zeros(9, 1, 16, 64),
        k_bounds=zeros(9, 1, 2, 64),
    ),
    bad("append_codes", "", seq_lens=full("seq_lens", 64), new_lens=full("new_lens", 0)),
    bad("append_codes", "", seq_lens=full("seq_lens", 61), new_lens=full("new_lens", 3), page_table=whole_table),
    bad(
        "append_codes",
        "",
        k_codes=of("k_codes", lambda x: x[:0]),
        code_scales=of("code_scales", lambda x: x[:0]),
        new_lens=full("new_lens", 0),
    ),
    bad("append_codes", "", k=zeros(2, 0, 2, 64), new_lens=full("new_lens", 0)),
    bad("append_codes", "", code_scales=of_three("code_scales")),
    *(bad("rerank_pages", "", token_reduce=name) for name in ops.TOKEN_REDUCE),
    *(bad("rerank_pages", "", token_reduce="lse", scale=scale) for scale in (MOST, 2.0**-126)),
    *(bad("rerank_pages", "", pages=full("pages", page)) for page in (-1, 0, 3)),
    *(bad("rerank_pages", "", pages=lens(2, *size)) for size in ((4, 3), (2, 0))),
    bad("rerank_pages", "", q=zeros(2, 8, 4, 64), pages=lens(2, 8, 2, 3), new_lens=full("seq_lens", 8)),
    *(bad("topk_pages", "", group_reduce=name) for name in ops.GROUP_REDUCE),
    bad("update_bounds", "", first_token=full("first_token", 0)),
    bad("update_bounds", "", first_token=full("first_token", 2**31 - 1)),
    bad("estimate", "", q=zeros(2, 8, 4, 64), new_lens=full("seq_lens", 8)),
    bad("estimate", "", q=zeros(2, 8, 4, 64), new_lens=full("seq_lens", 0)),
    bad("estimate", "", q=zeros(2, 2, 64)),
    bad("topk_pages", "", seq_lens=full("seq_lens", 64)),
    bad("topk_pages", "", scores=of_three_of(2, 4, 1), seq_lens=full("seq_lens", 16)),
    bad("topk_pages", "", scale=MOST),
    bad("topk_pages", "", k=1),
    bad("topk_pages", "", k=1, recent_pages=0),
    bad("topk_pages", "", k=3, sink_pages=2),
    bad("topk_pages", "", k=3, sink_pages=3, recent_pages=0),
    bad("topk_pages", "", num_kv_heads=4),
    *(bad("topk_pages", "", budgets=full("seq_lens", pages)) for pages in (-1, 0, 1, 2**31 - 1)),
    *(bad("sparse_decode", "", scale=scale) for scale in (-1.0, 0.0, MOST, -MOST)),
    *(bad("sparse_decode", "", pages=full("pages", page)) for page in (-1, 0, 3)),
    bad("sparse_decode", "", pages=lens(2, 4, 3)),
    bad("sparse_decode", "", pages=lens(2, 2, 0)),
    bad("decode_step", "", seq_lens=full("seq_lens", 0), start_lens=full("seq_lens", 0)),
    bad("decode_step", "", seq_lens=full("seq_lens", 64), start_lens=full("seq_lens", 63), page_table=whole_table),
    bad("decode_step", "", num_pages=2, sink_pages=2, recent_pages=0),
    *(bad("decode_step", "", counters=lens(count)) for count in (48, 100)),
    *(bad("decode_step", "", kept_pages=lens(2, 2, room), kept_steps=lens(2), reselect_every=2) for room in (2, 7)),
    bad("decode_step", "", reselect_every=2**31 - 1),
    *(
        bad("decode_step", "", num_pages=0, **more)
        for more in (
            {},
            {"counters": lens(48)},
            {"group_reduce": "none", "sink_pages": 3, "recent_pages": 0},
            {"sink_pages": 2**31 - 2},
            {"dense_below": 2**31 - 16},
        )
    ),
    *(bad(name, "", dense_below=tokens) for name in ("topk_pages", "decode_step") for tokens in (1, 36, 37, 10**6)),
    bad("decode_step", "", dense_below=48, kept_pages=lens(2, 2, 3), kept_steps=lens(2)),
]
