"""The operators, typed and documented, and their limits. Each is a thin call of ``torch.ops.quest.<name>``.

Sizes: B sequences, T new tokens a sequence, Hq query heads, Hkv KV heads, D head_dim, S page_size, N physical pages,
P logical pages that a sequence may have, K selected pages, Hs selection heads. Hs is Hkv where a group shares a page
list, and Hq where each head has its own. The limits are :data:`HEAD_DIMS` for D, :data:`PAGE_SIZES` for S, and
:data:`MAX_NEW_TOKENS` for T but in append_kv. P * S must fit in 31 bits.

All operators run on CPU and CUDA in the dtypes :data:`DTYPES`. They read lengths and page numbers on the device only.
Caches take any strides with ``stride(-1) == 1``: a cache laid out [N, S, Hkv, D] goes in as ``cache.transpose(1, 2)``.

A shape, dtype, device or stride that is not supported raises RuntimeError before anything is written. The error names
the argument, the requirement and the value found. Page numbers and lengths are always checked on the CPU. On the GPU
they are checked only with ``QUEST_OPS_CHECK=1`` in the environment, which costs a synchronisation. Unchecked, a wrong
number never leads outside the tensors, and a page that does not exist scores NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import SymInt, Tensor
from torch.compiler import is_compiling

from . import _autograd, _fake, _layouts  # noqa: F401 - they register their kernels
from ._library import ops as _ops
from ._limits import DTYPES, HEAD_COUNTERS, HEAD_DIMS, MAX_NEW_TOKENS, PAGE_SIZES, SHARED_COUNTERS

__all__ = [
    "DTYPES",
    "GROUP_REDUCE",
    "HEAD_DIMS",
    "MAX_NEW_TOKENS",
    "PAGE_SIZES",
    "TOKEN_REDUCE",
    "GroupReduce",
    "TokenReduce",
    "append_codes",
    "append_kv",
    "check_choice",
    "check_whole",
    "decode_step",
    "estimate",
    "new_counters",
    "rerank_pages",
    "sparse_decode",
    "topk_pages",
    "update_bounds",
]

GroupReduce = Literal["none", "max", "sum", "soft"]
#: The operators' number for each way of reducing a group.
GROUP_REDUCE: dict[str, int] = {"none": 0, "max": 1, "sum": 2, "soft": 3}

TokenReduce = Literal["max", "lse"]
#: The operator's number for each way of reducing a page's tokens.
TOKEN_REDUCE: dict[str, int] = {"max": 0, "lse": 1}


_NUMBERS = {bool, int, float, type(None)}


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ValueError unless ``value`` is one of the values ``allowed`` for the argument ``name``."""
    if isinstance(value, (Tensor, float)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")


def check_whole(name: str, value: object) -> None:
    """Raises ValueError unless ``value`` of the argument ``name`` is a whole number."""
    if not isinstance(value, (Integral, SymInt)):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def _check_numbers(names: str, *numbers: object) -> None:
    # PyTorch would convert a tensor of one element, which waits for its device and cannot be compiled.
    if is_compiling() or not {*map(type, numbers)} <= _NUMBERS:  # the types are quicker, and isinstance is traceable
        for name, number in zip(names.split(), numbers, strict=True):
            if isinstance(number, Tensor):
                raise RuntimeError(f"{name} must be a number, got a tensor of shape {list(number.shape)}")


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor | None = None,
    k_scales: Tensor | None = None,
    std_factor: float | None = None,
) -> None:
    """Write each sequence's new tokens after its cached ones and recompute the bounds of every page touched.

    The bounds come from the keys in the page, so they are exact whatever the page held before. Two sequences must not
    write to the same physical page. Minimum and maximum are Quest's bounds (Tang et al., ICML 2024, section 3.2). Mean
    and standard deviation are those of UNIQUE (2026).

    Args:
        k, v: [B, T, Hkv, D], any T. Keys are stored as given: apply RoPE first.
        k_cache, v_cache: [N, Hkv, S, D], written.
        k_bounds: [N, Hkv, 2, D], written. [..., 0, :] is the elementwise minimum of a page's keys, [..., 1, :] the
            maximum. In the cache's dtype, or whole numbers with ``k_scales``: int8, or uint8 [N, Hkv, 2, D / 2] of 4
            bits each. A byte then holds an even dimension in its low half and the next one in its high half, both
            plus 8.
        page_table: [B, P] int32, logical to physical page; only the pages written to are looked up.
        seq_lens: [B] int32, tokens in the cache before the call.
        new_lens: [B] int32, the number of real tokens among the T of each sequence, its first ones; T by default.
        k_scales: [N, Hkv] float32, written, for int8 and uint8 k_bounds. A page's bounds are then its whole numbers
            times its scale. Minimum and maximum are rounded outward, so that they stay bounds.
        std_factor: writes ``mean - std_factor * std`` and ``mean + std_factor * std`` of a page's keys in place of
            minimum and maximum, rounded to the nearest. The standard deviation divides by the number of keys. These are
            no bounds, but a single extreme key moves them less.

    Raises:
        RuntimeError: an argument that is not supported, as the module says.
    """
    _check_numbers("std_factor", std_factor)
    _ops.append_kv(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales, std_factor)


def update_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    first_token: Tensor | None = None,
    k_scales: Tensor | None = None,
    std_factor: float | None = None,
) -> None:
    """Recompute page bounds from the cache: after a roll-back, or where an engine writes its cache itself.

    Args:
        k_cache: [N, Hkv, S, D].
        k_bounds: as in :func:`append_kv`, written for the pages from that of ``first_token`` to the last of each
            sequence.
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache.
        first_token: [B] int32, the first token that changed; 0 by default.
        k_scales: [N, Hkv] float32, written, as in :func:`append_kv`.
        std_factor: as in :func:`append_kv`.

    Raises:
        RuntimeError: an argument that is not supported, as the module says.
    """
    _check_numbers("std_factor", std_factor)
    _ops.update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token, k_scales, std_factor)


def estimate(
    q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k_scales: Tensor | None = None,
    new_lens: Tensor | None = None,
) -> Tensor:
    """A score for each page: ``q+ . upper + q- . lower`` (Quest, section 3.3).

    It is an upper bound of q.k over the page where the bounds are minimum and maximum. Where they are mean and standard
    deviation it is ``q . mean + std_factor * sum_d |q_d| std_d``.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the last T tokens of each sequence.
        k_bounds: as in :func:`append_kv`.
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache, those of q included.
        page_size: S.
        k_scales: [N, Hkv] float32, for int8 and uint8 k_bounds: the scores use each whole number times its scale.
        new_lens: [B] int32, how many of the T tokens of each sequence are real, the first ones; all by default. The
            real ones are the sequence's last tokens. Padding sees no page.

    Returns:
        float32 [B, Hq, P] or [B, T, Hq, P], without the softmax scale; -inf past the last page that a token may see.

    Raises:
        RuntimeError: an argument that is not supported, as the module says.
    """
    _check_numbers("page_size", page_size)
    scores: Tensor = _ops.estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales, new_lens)
    return scores


def topk_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k: int,
    num_kv_heads: int,
    group_reduce: GroupReduce = "max",
    sink_pages: int = 0,
    recent_pages: int = 1,
    scale: float = 1.0,
    new_lens: Tensor | None = None,
    budgets: Tensor | None = None,
    dense_below: int = 0,
) -> Tensor:
    """The k best pages of each row: exact, ties to the lower page, NaN above everything.

    Args:
        scores: [B, Hq, P] or [B, T, Hq, P] float32, from :func:`estimate`.
        seq_lens: [B] int32, tokens in the cache.
        page_size: S.
        k: pages to select, forced ones included. A sequence of at most k pages gets them all.
        num_kv_heads: Hkv.
        group_reduce: how the heads of a group agree on one list.
            "max" and "sum" reduce their scores.
            "soft" takes each head's softmax over the pages, of its scores times ``scale``, and sums them.
            "none" selects for each query head separately, as in the paper.
        sink_pages: first pages that are always selected.
        recent_pages: last pages that are always selected; 1 keeps the page being written.
        scale: the attention's softmax scale, used by "soft" only.
        new_lens: as in :func:`estimate`. Padding selects no page.
        budgets: [B] int32, pages to select in each sequence; k for all by default. They are clamped to
            ``sink_pages + recent_pages`` and k.
        dense_below: a sequence of at most this number of tokens selects all its pages.

    Returns:
        int32 [B, Hs, K] or [B, T, Hs, K]: logical pages, ascending, unique, -1 at the end where there are fewer. K is
        k, or the pages of ``dense_below`` tokens where they are more.

    Raises:
        ValueError: an unknown ``group_reduce``.
        RuntimeError: an argument that is not supported, as the module says.
    """
    how = _group_reduce(group_reduce)
    forced = (sink_pages, recent_pages)
    names = "page_size k num_kv_heads sink_pages recent_pages scale dense_below"
    _check_numbers(names, page_size, k, num_kv_heads, sink_pages, recent_pages, scale, dense_below)
    pages: Tensor = _ops.topk_pages(
        scores, seq_lens, page_size, k, num_kv_heads, how, *forced, scale, new_lens, budgets, dense_below
    )
    return pages


def append_codes(
    k: Tensor,
    k_codes: Tensor,
    code_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor | None = None,
) -> None:
    """Write the codes of each sequence's new keys behind those of its cached ones, for :func:`rerank_pages`.

    A key is rotated by a Hadamard matrix, as in QuIP# (Tseng et al., ICML 2024). Each element then takes two bits: -3,
    -1, 1 or 3 times the token's scale. Codes of a prompt are written by one call with its keys and lengths of 0. A
    token's code depends on its key alone, so roll-backs and shared pages need no care.

    Args:
        k: [B, T, Hkv, D], any T, as the cache stores it.
        k_codes: [N, Hkv, S, D / 4] uint8, written. A byte holds four dimensions, the first in its lowest bits.
        code_scales: [N, Hkv, S] float32, written; NaN for a key that is not finite, or whose squares overflow float32.
        page_table: [B, P] int32, logical to physical page; only the pages written to are looked up.
        seq_lens: [B] int32, tokens in the cache before the call.
        new_lens: [B] int32, the number of real tokens among the T of each sequence, its first ones; T by default.

    Raises:
        RuntimeError: an argument that is not supported, as the module says.
    """
    _ops.append_codes(k, k_codes, code_scales, page_table, seq_lens, new_lens)


def rerank_pages(
    q: Tensor,
    k_codes: Tensor,
    code_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor,
    token_reduce: TokenReduce = "max",
    scale: float = 1.0,
    new_lens: Tensor | None = None,
) -> Tensor:
    """Score the listed pages again, by the codes of their tokens: a second stage after :func:`topk_pages`.

    A first list keeps more pages than the budget. :func:`topk_pages` on these scores then selects those that attention
    reads. Twilight (Lin et al., 2025) and ParisKV prune a Quest list by low-bit keys likewise.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the last T tokens of each sequence.
        k_codes, code_scales: of :func:`append_codes`.
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache, those of q included.
        pages: [B, Hs, K] or [B, T, Hs, K] int32 logical pages, as in :func:`sparse_decode`. -1 is padding.
        token_reduce: a page's score is the largest estimate of q.k of its tokens ("max"). Or it is their log-sum-exp
            ("lse"): that of the estimates times ``scale``, over ``scale``.
        scale: the attention's softmax scale, above 0, for "lse".
        new_lens: as in :func:`estimate`.

    Returns:
        float32 [B, Hq, P] or [B, T, Hq, P], without the softmax scale; -inf for pages that are not listed.

    Raises:
        RuntimeError: an argument that is not supported, as the module says.
        ValueError: a ``token_reduce`` of another name.
    """
    check_choice("token_reduce", token_reduce, tuple(TOKEN_REDUCE))
    _check_numbers("scale", scale)
    scores: Tensor = _ops.rerank_pages(
        q, k_codes, code_scales, page_table, seq_lens, pages, TOKEN_REDUCE[token_reduce], scale, new_lens
    )
    return scores


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor | None = None,
    scale: float | None = None,
    new_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the selected pages, or over all of them.

    The page list is cut into splits of a fixed number of tokens. So a sequence's result depends on neither its batch
    nor the cache's capacity. Reruns are bit-identical. Selecting every page equals ``pages=None`` bit for bit.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the last T tokens of each sequence, causal among themselves.
        k_cache, v_cache: [N, Hkv, S, D].
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache, those of q included.
        pages: int32 [B, Hs, K] or [B, T, Hs, K], Hs = Hkv or Hq. Logical pages without repetition, padded with -1.
            They may come from :func:`topk_pages` or elsewhere. None is dense paged attention by the same kernel.
        scale: of the scores before the softmax, 1 / sqrt(D) by default.
        new_lens: as in :func:`estimate`. Padding gives 0 and -inf.

    Returns:
        out like q, and lse, float32 [B, Hq] or [B, T, Hq]: the natural-log sum of exponentials of the scaled scores.
        A query with no visible token, or whose scores are all -inf, gives 0 and -inf.

    Raises:
        RuntimeError: an argument that is not supported, as the module says.
    """
    _check_numbers("scale", scale)
    out, lse = _ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale, new_lens)
    return out, lse


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    start_lens: Tensor,
    seq_lens: Tensor,
    num_pages: int,
    group_reduce: GroupReduce = "max",
    sink_pages: int = 0,
    recent_pages: int = 1,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    new_lens: Tensor | None = None,
    budgets: Tensor | None = None,
    std_factor: float | None = None,
    counters: Tensor | None = None,
    kept_pages: Tensor | None = None,
    kept_steps: Tensor | None = None,
    reselect_every: int = 1,
    dense_below: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's whole step: append_kv, estimate, topk_pages and sparse_decode, with their results bit for bit.

    On a GPU the step is a single kernel, given ``counters``, where all of these hold. Otherwise it is four operators in
    a row.

    - One new token in float16 or bfloat16, and at most 256 sequences.
    - At most 16 query heads a KV head.
    - ``group_reduce`` "max" or "sum", or "none" with one query head a KV head, and ``recent_pages`` of at least 1. Or a
      ``num_pages`` of 0, unless one block would have too much to combine at this capacity.
    - All tensors aligned to 16 bytes, rows of k_bounds too, and 768 bytes of shared memory a head dimension.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the T new tokens of each sequence.
        k, v: [B, T, Hkv, D], T = 1 where q has no such dimension. Keys with RoPE applied.
        k_cache, v_cache, k_bounds, k_scales: as in :func:`append_kv`, written.
        page_table: [B, P] int32.
        start_lens: [B] int32, tokens in the cache before the call.
        seq_lens: [B] int32, ``start_lens + T``, or ``start_lens + new_lens``. A sequence whose start_lens and seq_lens
            are 0 is idle, such as the unused rows of a CUDA graph's batch. Nothing is written for it, and out is 0.
        num_pages: pages to read, as ``k`` of :func:`topk_pages`. 0 reads every page: dense attention, as
            :func:`sparse_decode` without lists.
        group_reduce, sink_pages, recent_pages: as in :func:`topk_pages`.
        scale: of the scores before the softmax, 1 / sqrt(D) by default.
        new_lens: [B] int32, how many of the T tokens of each sequence are real, as in speculation with drafts of
            different lengths. They are the first ones; the others are padding, which is not written and gives 0.
        budgets: [B] int32, as in :func:`topk_pages`: a number of pages for each request, ``num_pages`` at most.
        std_factor: as in :func:`append_kv`.
        counters: of :func:`new_counters`, written. Blocks of the kernel share their work by them. A call leaves them
            as the next one needs them, so one tensor serves all steps on a stream. Steps that may overlap, on several
            streams, need one each. Without it a small kernel clears counters first.
        kept_pages: [B, Hs, K or more] int32, contiguous, written: lists of pages that sequences keep for some steps, as
            in LServe (Yang et al., MLSys 2025). Each list is in the first K places of its row. Needs one new token and
            ``recent_pages`` of at least 1. A step that keeps lists neither reads bounds nor selects, where it is a
            single kernel or on the CPU.
        kept_steps: [B] int32, given with ``kept_pages``. A sequence selects pages where its number is a multiple of
            ``reselect_every``. Elsewhere it reads its list of the step before, with the newest ``recent_pages`` pages
            in the list's last places. Other places are read where they have a page before those. A sequence must
            select in its first step, and after a step in which it was idle.
        reselect_every: steps from one selection to the next.
        dense_below: as in :func:`topk_pages`. With ``kept_pages``, a sequence must select in its first step beyond.

    Returns:
        out and lse of :func:`sparse_decode`, and the pages that :func:`topk_pages` selected. With ``kept_pages``, which
        has the pages then, and with a ``num_pages`` of 0 the third tensor has no element: [B, Hs, 0].

    Raises:
        ValueError: an unknown ``group_reduce``.
        RuntimeError: an argument that is not supported, as the module says.
    """
    names = "num_pages sink_pages recent_pages scale std_factor reselect_every dense_below"
    _check_numbers(names, num_pages, sink_pages, recent_pages, scale, std_factor, reselect_every, dense_below)
    out, lse, pages = _ops.decode_step(
        q,
        k,
        v,
        k_cache,
        v_cache,
        k_bounds,
        page_table,
        start_lens,
        seq_lens,
        num_pages,
        _group_reduce(group_reduce),
        sink_pages,
        recent_pages,
        scale,
        k_scales,
        new_lens,
        budgets,
        std_factor,
        counters,
        kept_pages,
        kept_steps,
        reselect_every,
        dense_below,
    )
    return out, lse, pages


def new_counters(batch_size: int, num_kv_heads: int, device: torch.device | str) -> Tensor:
    """Counters for :func:`decode_step`, for at most ``batch_size`` sequences: int32 zeros."""
    count = SHARED_COUNTERS + HEAD_COUNTERS * batch_size * num_kv_heads
    return torch.zeros(count, dtype=torch.int32, device=device)


def _group_reduce(name: str) -> int:
    if not isinstance(name, str) or name not in GROUP_REDUCE:
        raise ValueError(f"group_reduce must be one of {', '.join(GROUP_REDUCE)}, got {name!r}")
    return GROUP_REDUCE[name]
