"""The checks of csrc/checks.h and csrc/check_tensors.h for the fake kernels, in the same order and words.

Each function here has the name of its C++ counterpart. Values in tensors are not checked, since a fake tensor has none.

A check raises where its condition is known to be false, and never adds a guard: a symbolic size stays symbolic. Where a
condition is unknown, the real kernel checks it when the compiled code runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymBool, SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._limits import DTYPES, HEAD_COUNTERS, HEAD_DIMS, MAX_COUNT, MAX_NEW_TOKENS, PAGE_SIZES, SHARED_COUNTERS

Size = Any  # int or torch.SymInt; mypy knows no arithmetic of both

# C++ names of dtypes that Python calls otherwise.
_DTYPE_NAMES = {
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float64: "Double",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.uint16: "UInt16",
    torch.uint32: "UInt32",
    torch.uint64: "UInt64",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def _dtype_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.").capitalize()


def _shape_string(t: Tensor) -> str:
    # The size that a symbol stands for while tracing, since eager mode says that one. Reading it adds no guard.
    known = (x.node.hint if isinstance(x, SymInt) and x.node.has_hint() else x for x in t.shape)
    return f"[{', '.join(map(str, known))}]"


def _list_string(values: Sequence[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def _known_false(condition: bool | SymBool) -> bool:
    return not condition if isinstance(condition, bool) else statically_known_true(torch.sym_not(condition))


def _is_one_of(values: Sequence[int], value: Size) -> bool | SymBool:
    """Whether a size is one of some. A symbolic size is left to the real kernel."""
    return isinstance(value, SymInt) or value in values


def _require(condition: bool | SymBool, message: str) -> None:
    if _known_false(condition):
        raise RuntimeError(message)


# Written tensors: csrc/mark_written.h


def check_written(tensors: Mapping[str, Tensor | None]) -> None:
    """Raises RuntimeError where gradients are recorded and a written tensor requires one."""
    for name, x in tensors.items():
        if torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise RuntimeError(
                f"{name} must not require a gradient, since it is written to: quest_ops is for decoding. Call it under "
                f"torch.no_grad() or torch.inference_mode(), or detach {name}"
            )


# One tensor: csrc/check_tensors.h


def check_given(t: Tensor | None, name: str) -> None:
    if t is None:
        raise RuntimeError(f"{name} must be a tensor, got None")


def check_dim(t: Tensor, name: str, dim: int, shape: str) -> None:
    check_given(t, name)
    if t.dim() != dim:
        raise RuntimeError(f"{name} must have shape {shape}, got {_shape_string(t)}")


def check_size(t: Tensor, name: str, dim: int, want: Size, shape: str, why: str) -> None:
    if _known_false(t.shape[dim] == want):
        raise RuntimeError(
            f"{name} must have shape {shape} with {want} in dimension {dim} ({why}), got {_shape_string(t)}"
        )


def check_same_device(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if t.device != like.device:
        raise RuntimeError(f"{name} must be on {like.device} like {like_name}, got {t.device}")


def check_last_stride(t: Tensor, name: str) -> None:
    if t.dim() and not (isinstance(t.shape[-1], int) and t.shape[-1] <= 1):
        _require(t.stride(-1) == 1, f"{name} must have stride 1 in its last dimension, got {t.stride(-1)}")


def check_int32(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    check_given(t, name)
    if t.dtype != torch.int32:
        raise RuntimeError(f"{name} must be int32, got {_dtype_name(t.dtype)}")
    check_same_device(t, name, like, like_name)
    check_last_stride(t, name)


def check_dtype(t: Tensor, name: str) -> None:
    check_given(t, name)
    if t.dtype not in DTYPES:
        raise RuntimeError(f"{name} must be float32, float16 or bfloat16, got {_dtype_name(t.dtype)}")


def check_like(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    check_given(t, name)
    if t.dtype != like.dtype:
        raise RuntimeError(f"{name} must be {_dtype_name(like.dtype)} like {like_name}, got {_dtype_name(t.dtype)}")
    check_same_device(t, name, like, like_name)
    check_last_stride(t, name)


def check_head_dim(t: Tensor, name: str) -> Size:
    d = t.shape[-1]
    _require(
        _is_one_of(HEAD_DIMS, d),
        f"{name} must have head_dim {_list_string(HEAD_DIMS)} in its last dimension, got {d}",
    )
    return d


def check_page_size(page_size: Size, name: str) -> None:
    _require(_is_one_of(PAGE_SIZES, page_size), f"{name} must be {_list_string(PAGE_SIZES)}, got {page_size}")


def check_int32_range(value: Size, what: str) -> None:
    for condition in (value >= 0, value <= MAX_COUNT):
        _require(condition, f"{what} must fit in 32 bits, got {value}")


def check_pages(pages: Size, page_size: Size, tokens: str) -> None:
    for condition in (pages >= 0, pages * page_size <= MAX_COUNT):
        if _known_false(condition):
            raise RuntimeError(f"{tokens} must fit in 32 bits, got {min(pages * page_size, 2**63 - 1)}")


def check_groups(heads: Size, kv_heads: Size, heads_name: str, kv_heads_name: str) -> None:
    positive = (kv_heads > 0, heads > 0)
    if any(map(_known_false, positive)) or _known_false(heads % kv_heads == 0):
        raise RuntimeError(f"{heads_name} must be a positive multiple of {kv_heads_name}, got {heads} and {kv_heads}")
    check_int32_range(heads, heads_name)


def check_scale(scale: float) -> None:
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise RuntimeError(f"scale must be a finite number, got {scale:g}")


def check_own_memory(t: Tensor, name: str) -> None:
    for i, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if _known_false(stride != 0) and not _known_false(size > 1):
            raise RuntimeError(
                f"{name} must have memory of its own for each element, since it is written to, "
                f"got stride 0 in dimension {i}"
            )


def check_paging(
    page_table: Tensor,
    seq_lens: Tensor,
    B: Size,
    N: Size,
    page_size: Size,
    like: Tensor,
    like_name: str,
    lens_name: str = "seq_lens",
) -> None:
    check_int32(page_table, "page_table", like, like_name)
    check_int32(seq_lens, lens_name, like, like_name)
    check_dim(page_table, "page_table", 2, "[B, P]")
    check_dim(seq_lens, lens_name, 1, "[B]")
    check_size(page_table, "page_table", 0, B, "[B, P]", "one row a sequence")
    check_size(seq_lens, lens_name, 0, B, "[B]", "one length a sequence")
    check_pages(page_table.shape[1], page_size, "page_table's tokens a sequence (P * page_size)")
    check_int32_range(N, "the cache's number of pages")


def check_leading(t: Tensor, name: str, shapes: str) -> tuple[Size, Size, Size]:
    """B, T and the number of heads of [B, H, X] or [B, T, H, X]."""
    if t.dim() not in (3, 4):
        raise RuntimeError(f"{name} must have shape {shapes}, got {_shape_string(t)}")
    T = t.shape[1] if t.dim() == 4 else 1
    for condition in (T >= 1, T <= MAX_NEW_TOKENS):
        _require(condition, f"{name} must have 1 to {MAX_NEW_TOKENS} new tokens in dimension 1, got {T}")
    check_int32_range(t.shape[0], "the number of sequences")
    return t.shape[0], T, t.shape[-2]


def check_cache(t: Tensor, name: str, like: Tensor, like_name: str, Hkv: Size, D: Size) -> None:
    check_dim(t, name, 4, "[N, Hkv, S, D]")
    check_like(t, name, like, like_name)
    check_size(t, name, 1, Hkv, "[N, Hkv, S, D]", "the number of KV heads")
    check_size(t, name, 3, D, "[N, Hkv, S, D]", "head_dim")


def check_same_pages(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if _known_false(t.shape[0] == like.shape[0]):
        raise RuntimeError(f"{name} must have as many pages as {like_name}, {like.shape[0]}, got {t.shape[0]}")


def check_bounds(
    t: Tensor,
    scales: Tensor | None,
    like: Tensor,
    like_name: str,
    Hkv: Size,
    D: Size,
    std_factor: float | None = None,
) -> None:
    check_dim(t, "k_bounds", 4, "[N, Hkv, 2, D]")
    packed = t.dtype == torch.uint8
    if scales is not None:
        if t.dtype != torch.int8 and not packed:
            raise RuntimeError(f"k_bounds must be int8 or uint8 where k_scales is given, got {_dtype_name(t.dtype)}")
        check_same_device(t, "k_bounds", like, like_name)
        check_last_stride(t, "k_bounds")
    else:
        if t.dtype == torch.int8 or packed:
            raise RuntimeError(f"k_bounds of {'uint8' if packed else 'int8'} needs k_scales, got none")
        check_like(t, "k_bounds", like, like_name)
    check_size(t, "k_bounds", 1, Hkv, "[N, Hkv, 2, D]", "the number of KV heads")
    check_size(t, "k_bounds", 2, 2, "[N, Hkv, 2, D]", "lower and upper")
    if packed:
        check_size(t, "k_bounds", 3, D // 2, "[N, Hkv, 2, D / 2]", "head_dim, two dimensions a byte")
    else:
        check_size(t, "k_bounds", 3, D, "[N, Hkv, 2, D]", "head_dim")
    if std_factor is not None and not 0 <= std_factor <= torch.finfo(torch.float32).max:
        raise RuntimeError(
            f"std_factor must be a finite number of at least 0, or None for minimum and maximum, got {std_factor:g}"
        )
    if scales is None:
        return
    if scales.dtype != torch.float32:
        raise RuntimeError(f"k_scales must be float32, got {_dtype_name(scales.dtype)}")
    check_same_device(scales, "k_scales", like, like_name)
    check_dim(scales, "k_scales", 2, "[N, Hkv]")
    check_size(scales, "k_scales", 0, t.shape[0], "[N, Hkv]", "the pages of k_bounds")
    check_size(scales, "k_scales", 1, Hkv, "[N, Hkv]", "the number of KV heads")


def check_codes(t: Tensor, scales: Tensor, like: Tensor, like_name: str, Hkv: Size, D: Size) -> None:
    check_dim(t, "k_codes", 4, "[N, Hkv, S, D / 4]")
    if t.dtype != torch.uint8:
        raise RuntimeError(f"k_codes must be uint8, got {_dtype_name(t.dtype)}")
    check_same_device(t, "k_codes", like, like_name)
    check_last_stride(t, "k_codes")
    check_size(t, "k_codes", 1, Hkv, "[N, Hkv, S, D / 4]", "the number of KV heads")
    check_size(t, "k_codes", 3, D // 4, "[N, Hkv, S, D / 4]", "head_dim, four dimensions a byte")
    check_given(scales, "code_scales")
    if scales.dtype != torch.float32:
        raise RuntimeError(f"code_scales must be float32, got {_dtype_name(scales.dtype)}")
    check_same_device(scales, "code_scales", like, like_name)
    check_dim(scales, "code_scales", 3, "[N, Hkv, S]")
    for i in range(3):
        check_size(scales, "code_scales", i, t.shape[i], "[N, Hkv, S]", "the tokens of k_codes")


def check_new_tokens(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    check_dim(t, name, 4, "[B, T, Hkv, D]")
    check_like(t, name, like, like_name)
    for i in range(4):
        check_size(t, name, i, like.shape[i], "[B, T, Hkv, D]", "the shape of k")


def check_optional_lens(t: Tensor | None, name: str, B: Size, like: Tensor, like_name: str) -> None:
    if t is None:
        return
    check_int32(t, name, like, like_name)
    check_dim(t, name, 1, "[B]")
    check_size(t, name, 0, B, "[B]", "one number a sequence")


def check_counters(t: Tensor | None, B: Size, Hkv: Size, q: Tensor) -> None:
    if t is None:
        return
    check_int32(t, "counters", q, "q")
    check_dim(t, "counters", 1, "[count]")
    least = SHARED_COUNTERS + HEAD_COUNTERS * B * Hkv
    if _known_false(t.shape[0] >= least):
        raise RuntimeError(
            f"counters must have at least {SHARED_COUNTERS} + {HEAD_COUNTERS} * B * Hkv = {least} numbers, "
            f"got {t.shape[0]}"
        )


def check_kept_pages(
    pages: Tensor | None,
    steps: Tensor | None,
    reselect_every: int,
    q: Tensor,
    Hs: Size,
    K: Size,
    recent_pages: int,
) -> None:
    _require(
        1 <= reselect_every <= MAX_COUNT, f"reselect_every must be at least 1 and fit in 32 bits, got {reselect_every}"
    )
    if (pages is None) != (steps is None):
        alone = "kept_steps" if pages is None else "kept_pages"
        raise RuntimeError(f"kept_pages and kept_steps must be given together, got {alone} alone")
    if pages is None:
        return
    shape = "[B, Hs, K or more]"
    check_int32(pages, "kept_pages", q, "q")
    check_dim(pages, "kept_pages", 3, shape)
    check_size(pages, "kept_pages", 0, q.shape[0], shape, "the number of sequences")
    check_size(pages, "kept_pages", 1, Hs, shape, "a list for each selecting head")
    if _known_false(pages.shape[2] >= K):
        raise RuntimeError(
            f"kept_pages must have shape {shape} with K = {K} in dimension 2, got {_shape_string(pages)}"
        )
    if not any(isinstance(size, SymInt) for size in pages.shape) and not pages.is_contiguous():
        raise RuntimeError("kept_pages must be contiguous, got strides that are not")
    if q.dim() == 4:
        _require(q.shape[1] == 1, f"kept_pages must be left out with several new tokens, got {q.shape[1]} of them")
    _require(recent_pages >= 1, f"recent_pages must be at least 1 with kept_pages, got {recent_pages}")
    check_optional_lens(steps, "kept_steps", q.shape[0], q, "q")
    check_int32_range(pages.shape[2], "kept_pages' places")


# One operator: csrc/checks.h


def check_append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor | None,
    k_scales: Tensor | None,
    std_factor: float | None,
    lens_name: str = "seq_lens",
) -> None:
    check_dtype(k, "k")
    check_dim(k, "k", 4, "[B, T, Hkv, D]")
    B, T, Hkv, _ = k.shape
    D = check_head_dim(k, "k")
    check_new_tokens(k, "k", k, "k")
    check_new_tokens(v, "v", k, "k")
    check_cache(k_cache, "k_cache", k, "k", Hkv, D)
    check_cache(v_cache, "v_cache", k, "k", Hkv, D)
    check_bounds(k_bounds, k_scales, k, "k", Hkv, D, std_factor)
    check_same_pages(v_cache, "v_cache", k_cache, "k_cache")
    check_same_pages(k_bounds, "k_bounds", k_cache, "k_cache")
    check_size(v_cache, "v_cache", 2, k_cache.shape[2], "[N, Hkv, S, D]", "the page size of k_cache")
    check_page_size(k_cache.shape[2], "k_cache's page size (dimension 2)")
    check_paging(page_table, seq_lens, B, k_cache.shape[0], k_cache.shape[2], k, "k", lens_name)
    check_optional_lens(new_lens, "new_lens", B, k, "k")
    if not _known_false(B > 0):
        check_own_memory(k_cache, "k_cache")
        check_own_memory(v_cache, "v_cache")
        check_own_memory(k_bounds, "k_bounds")
        if k_scales is not None:
            check_own_memory(k_scales, "k_scales")
        if v_cache is k_cache:
            raise RuntimeError("v_cache must have memory of its own, since it is written to, got that of k_cache")
    for size, name in ((Hkv, "the number of KV heads"), (B, "B"), (T, "T")):
        check_int32_range(size, name)


def check_update_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    first_token: Tensor | None,
    k_scales: Tensor | None,
    std_factor: float | None,
) -> None:
    check_dtype(k_cache, "k_cache")
    check_dim(k_cache, "k_cache", 4, "[N, Hkv, S, D]")
    N, Hkv, S, _ = k_cache.shape
    D = check_head_dim(k_cache, "k_cache")
    check_cache(k_cache, "k_cache", k_cache, "k_cache", Hkv, D)
    check_bounds(k_bounds, k_scales, k_cache, "k_cache", Hkv, D, std_factor)
    check_same_pages(k_bounds, "k_bounds", k_cache, "k_cache")
    check_page_size(S, "k_cache's page size (dimension 2)")
    check_dim(page_table, "page_table", 2, "[B, P]")
    B = page_table.shape[0]
    check_paging(page_table, seq_lens, B, N, S, k_cache, "k_cache")
    check_optional_lens(first_token, "first_token", B, k_cache, "k_cache")
    if not _known_false(B > 0):
        check_own_memory(k_bounds, "k_bounds")
        if k_scales is not None:
            check_own_memory(k_scales, "k_scales")
    check_int32_range(Hkv, "the number of KV heads")
    check_int32_range(B, "B")


def check_estimate(
    q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: Size,
    k_scales: Tensor | None,
    new_lens: Tensor | None,
) -> None:
    check_dtype(q, "q")
    B, _, Hq = check_leading(q, "q", "[B, Hq, D] or [B, T, Hq, D]")
    check_last_stride(q, "q")
    D = check_head_dim(q, "q")
    check_dim(k_bounds, "k_bounds", 4, "[N, Hkv, 2, D]")
    Hkv = k_bounds.shape[1]
    check_groups(Hq, Hkv, "q's heads", "k_bounds' heads")
    check_bounds(k_bounds, k_scales, q, "q", Hkv, D)
    check_page_size(page_size, "page_size")
    check_paging(page_table, seq_lens, B, k_bounds.shape[0], page_size, q, "q")
    check_optional_lens(new_lens, "new_lens", B, q, "q")


def check_selection(k: Size, name: str, group_reduce: int, sink_pages: Size, recent_pages: Size) -> None:
    _require(0 <= group_reduce <= 3, f"group_reduce must be 0 (none), 1 (max), 2 (sum) or 3 (soft), got {group_reduce}")
    check_int32_range(k, name)
    _require(k >= 1, f"{name} must be at least 1, got {k}")
    _require(sink_pages >= 0, f"sink_pages must be at least 0, got {sink_pages}")
    _require(recent_pages >= 0, f"recent_pages must be at least 0, got {recent_pages}")
    _require(
        sink_pages + recent_pages <= k,
        f"{name} must hold the forced pages: sink_pages + recent_pages is {sink_pages} + {recent_pages}, "
        f"got {name} = {k}",
    )


def check_topk_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: Size,
    k: Size,
    num_kv_heads: Size,
    group_reduce: int,
    sink_pages: int,
    recent_pages: int,
    scale: float,
    new_lens: Tensor | None,
    budgets: Tensor | None,
    dense_below: int,
) -> None:
    check_given(scores, "scores")
    if scores.dtype != torch.float32:
        raise RuntimeError(f"scores must be float32, got {_dtype_name(scores.dtype)}")
    B, _, Hq = check_leading(scores, "scores", "[B, Hq, P] or [B, T, Hq, P]")
    check_last_stride(scores, "scores")
    check_groups(Hq, num_kv_heads, "scores' heads", "num_kv_heads")
    check_selection(k, "k", group_reduce, sink_pages, recent_pages)
    check_page_size(page_size, "page_size")
    check_int32(seq_lens, "seq_lens", scores, "scores")
    check_dim(seq_lens, "seq_lens", 1, "[B]")
    check_size(seq_lens, "seq_lens", 0, B, "[B]", "one length a sequence")
    check_pages(scores.shape[-1], page_size, "scores' tokens a sequence (P * page_size)")
    check_optional_lens(new_lens, "new_lens", B, scores, "scores")
    check_scale(scale)
    check_optional_lens(budgets, "budgets", B, scores, "scores")
    check_dense_below(dense_below, page_size)


def check_dense_below(dense_below: int, page_size: Size) -> None:
    check_int32_range(dense_below, "dense_below")
    check_pages(pages_of(dense_below, page_size), page_size, "dense_below in whole pages")


def pages_of(tokens: int, page_size: Size) -> Size:
    return (tokens + page_size - 1) // page_size


def check_lists(pages: Tensor, q: Tensor, leading: tuple[Size, Size, Size], Hkv: Size, page_size: Size) -> None:
    B, T, Hq = leading
    check_int32(pages, "pages", q, "q")
    shape = "[B, T, Hs, K] like q's [B, T, Hq, D]" if q.dim() == 4 else "[B, Hs, K] like q's [B, Hq, D]"
    check_dim(pages, "pages", q.dim(), shape)
    pages_B, pages_T, Hs = check_leading(pages, "pages", shape)
    wrong_heads = _known_false(Hs == Hkv) and _known_false(Hs == Hq)
    if wrong_heads or _known_false(pages_B == B) or _known_false(pages_T == T):
        raise RuntimeError(
            f"pages must have shape {shape} with Hs {Hkv} (a list a KV head) or {Hq} (a list a query head), "
            f"got {_shape_string(pages)} for q {_shape_string(q)}"
        )
    check_pages(pages.shape[-1], page_size, "pages' tokens a list (K * page_size)")


def check_append_codes(
    k: Tensor, k_codes: Tensor, code_scales: Tensor, page_table: Tensor, seq_lens: Tensor, new_lens: Tensor | None
) -> None:
    check_dtype(k, "k")
    check_dim(k, "k", 4, "[B, T, Hkv, D]")
    B, T, Hkv, _ = k.shape
    D = check_head_dim(k, "k")
    check_new_tokens(k, "k", k, "k")
    check_codes(k_codes, code_scales, k, "k", Hkv, D)
    check_page_size(k_codes.shape[2], "k_codes' page size (dimension 2)")
    check_paging(page_table, seq_lens, B, k_codes.shape[0], k_codes.shape[2], k, "k")
    check_optional_lens(new_lens, "new_lens", B, k, "k")
    if not _known_false(B > 0):
        check_own_memory(k_codes, "k_codes")
        check_own_memory(code_scales, "code_scales")
    for size, name in ((Hkv, "the number of KV heads"), (B, "B"), (T, "T")):
        check_int32_range(size, name)


def check_rerank_pages(
    q: Tensor,
    k_codes: Tensor,
    code_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor,
    token_reduce: int,
    scale: float,
    new_lens: Tensor | None,
) -> None:
    check_dtype(q, "q")
    B, T, Hq = check_leading(q, "q", "[B, Hq, D] or [B, T, Hq, D]")
    check_last_stride(q, "q")
    D = check_head_dim(q, "q")
    check_dim(k_codes, "k_codes", 4, "[N, Hkv, S, D / 4]")
    N, Hkv, S, _ = k_codes.shape
    check_groups(Hq, Hkv, "q's heads", "k_codes' heads")
    check_codes(k_codes, code_scales, q, "q", Hkv, D)
    check_page_size(S, "k_codes' page size (dimension 2)")
    check_paging(page_table, seq_lens, B, N, S, q, "q")
    check_optional_lens(new_lens, "new_lens", B, q, "q")
    check_lists(pages, q, (B, T, Hq), Hkv, S)
    _require(0 <= token_reduce <= 1, f"token_reduce must be 0 (max) or 1 (lse), got {token_reduce}")
    check_scale(scale)
    smallest = 2.0**-150  # rounds to 0 in float32
    _require(scale > smallest, f"scale must be above 0, got {scale:g}")


def check_sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor | None,
    scale: float | None,
    new_lens: Tensor | None,
) -> None:
    check_dtype(q, "q")
    B, T, Hq = check_leading(q, "q", "[B, Hq, D] or [B, T, Hq, D]")
    check_last_stride(q, "q")
    D = check_head_dim(q, "q")
    check_dim(k_cache, "k_cache", 4, "[N, Hkv, S, D]")
    N, Hkv, S, _ = k_cache.shape
    check_groups(Hq, Hkv, "q's heads", "k_cache's heads")
    check_cache(k_cache, "k_cache", q, "q", Hkv, D)
    check_cache(v_cache, "v_cache", q, "q", Hkv, D)
    check_same_pages(v_cache, "v_cache", k_cache, "k_cache")
    check_size(v_cache, "v_cache", 2, S, "[N, Hkv, S, D]", "the page size of k_cache")
    check_page_size(S, "k_cache's page size (dimension 2)")
    check_paging(page_table, seq_lens, B, N, S, q, "q")
    check_optional_lens(new_lens, "new_lens", B, q, "q")
    if scale is not None:
        check_scale(scale)
    if pages is not None:
        check_lists(pages, q, (B, T, Hq), Hkv, S)


def check_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    start_lens: Tensor,
    seq_lens: Tensor,
    num_pages: Size,
    group_reduce: int,
    sink_pages: int,
    recent_pages: int,
    scale: float | None,
    k_scales: Tensor | None,
    new_lens: Tensor | None,
    budgets: Tensor | None,
    std_factor: float | None,
    counters: Tensor | None,
    kept_pages: Tensor | None,
    kept_steps: Tensor | None,
    reselect_every: int,
    dense_below: int,
) -> None:
    check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, None, scale, new_lens)
    check_like(k, "k", q, "q")
    check_dim(k, "k", 4, "[B, T, Hkv, D]")
    check_size(k, "k", 0, q.shape[0], "[B, T, Hkv, D]", "the number of sequences")
    check_size(k, "k", 1, q.shape[1] if q.dim() == 4 else 1, "[B, T, Hkv, D]", "the new tokens of q")
    check_append_kv(
        k, v, k_cache, v_cache, k_bounds, page_table, start_lens, new_lens, k_scales, std_factor, "start_lens"
    )
    dense = num_pages == 0
    check_selection(MAX_COUNT if dense else num_pages, "num_pages", group_reduce, sink_pages, recent_pages)
    check_pages(num_pages, k_cache.shape[2], "num_pages' tokens a list (num_pages * page_size)")
    check_dense_below(dense_below, k_cache.shape[2])
    for name, tensor in (("budgets", budgets), ("kept_pages", kept_pages)):
        if dense and tensor is not None:
            raise RuntimeError(f"{name} must be left out with a num_pages of 0, which reads every page")
    check_optional_lens(budgets, "budgets", q.shape[0], q, "q")
    check_counters(counters, q.shape[0], k_cache.shape[1], q)
    Hs = q.shape[-2] if group_reduce == 0 else k_cache.shape[1]
    places = max(num_pages, pages_of(dense_below, k_cache.shape[2]))
    check_kept_pages(kept_pages, kept_steps, reselect_every, q, Hs, places, recent_pages)
