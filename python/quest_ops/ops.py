"""The operators, typed and documented. Each is a thin call of ``torch.ops.quest.<name>``, which may be called as well.

Words: B sequences, T new tokens each (1 to 8), Hq query heads, Hkv KV heads, D head_dim (64, 80, 96, 128, 192, 256),
S page_size (8, 16, 32, 64, 128), N physical pages, P logical pages a sequence may have, K selected pages, Hs selection
heads: Hkv where a group shares a list, Hq where each head has its own.

All operators run on CPU and CUDA in float32, float16 and bfloat16, read lengths and page numbers on the device only,
and raise RuntimeError for a shape, dtype, device or stride they do not take, naming the argument, what it must be and
what it was, before anything is written. Page numbers and lengths are checked on the CPU always, and on the GPU where
the environment has ``QUEST_OPS_CHECK=1`` (which costs a synchronisation); unchecked, a wrong number never leads outside
the tensors, and a page that does not exist scores NaN. Caches take any strides with ``stride(-1) == 1``: a cache that
is laid out [N, S, Hkv, D] goes in as ``cache.transpose(1, 2)``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ._library import ops as _ops

GroupReduce = Literal["none", "max", "sum", "soft"]
GROUP_REDUCE: dict[str, int] = {"none": 0, "max": 1, "sum": 2, "soft": 3}


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
) -> None:
    """Write new tokens behind what each sequence holds and renew the bounds of every page touched.

    The bounds are recomputed from the keys that are in the page, so they are exact whatever the page held before.
    Two rows must not write to the same physical page.

    Args:
        k, v: [B, T, Hkv, D], any T. Keys are stored as given: apply RoPE first.
        k_cache, v_cache: [N, Hkv, S, D], written.
        k_bounds: [N, Hkv, 2, D], written: [..., 0, :] the elementwise minimum of a page's keys, [..., 1, :] maximum.
        page_table: [B, P] int32, logical to physical page; only the pages written to are looked up.
        seq_lens: [B] int32, tokens in the cache before the call.
        new_lens: [B] int32, how many of the T tokens of each row are real; all by default.
        k_scales: [N, Hkv] float32, written, with 8-bit bounds: k_bounds is then int8, and a page's bounds are its
            numbers times its scale, rounded outward, so that they stay bounds.

    Page metadata as in Quest (Tang et al., ICML 2024, section 3.2).
    """
    _ops.append_kv(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales)


def update_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    first_token: Tensor | None = None,
    k_scales: Tensor | None = None,
) -> None:
    """Recompute page bounds from the cache: for engines that write their cache themselves, and after roll-back.

    Args:
        k_cache: [N, Hkv, S, D].
        k_bounds: [N, Hkv, 2, D], written for the pages from that of ``first_token`` to the last of each sequence.
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache.
        first_token: [B] int32, the first token that changed; 0 by default.
        k_scales: [N, Hkv] float32, written, where k_bounds is int8, as in :func:`append_kv`.
    """
    _ops.update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token, k_scales)


def estimate(
    q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k_scales: Tensor | None = None,
) -> Tensor:
    """An upper bound of q.k over each page: ``q+ . upper + q- . lower`` (Quest, section 3.3).

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the last T tokens of each sequence.
        k_bounds: [N, Hkv, 2, D].
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache, those of q included.
        page_size: S.
        k_scales: [N, Hkv] float32, where k_bounds is int8: the scores are those of the bounds times their scales.

    Returns:
        float32 [B, Hq, P] or [B, T, Hq, P], without the softmax scale; -inf past the last page that a token may see.
    """
    scores: Tensor = _ops.estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales)
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
) -> Tensor:
    """The k best pages of each row: exact, ties to the lower page, NaN above everything.

    Args:
        scores: [B, Hq, P] or [B, T, Hq, P] float32, from :func:`estimate`.
        seq_lens: [B] int32, tokens in the cache.
        page_size: S.
        k: pages to select, forced ones included. A sequence of at most k pages gets them all.
        num_kv_heads: Hkv.
        group_reduce: how the heads of a group agree on one list: "max" or "sum" of their scores, "soft" (each head's
            scores times ``scale`` softmaxed over the pages, then summed), or "none": a list for each query head, as in
            the paper.
        sink_pages: first pages that are always selected.
        recent_pages: last pages that are always selected; 1 keeps the page being written.
        scale: the attention's softmax scale, used by "soft" only.

    Returns:
        int32 [B, Hs, k] or [B, T, Hs, k]: logical pages, ascending, unique, -1 at the end where there are fewer.
    """
    how = _group_reduce(group_reduce)
    pages: Tensor = _ops.topk_pages(scores, seq_lens, page_size, k, num_kv_heads, how, sink_pages, recent_pages, scale)
    return pages


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the selected pages, or over all of them.

    Work is cut by a fixed number of tokens of the page list, so that a row's result depends on neither the batch it is
    in nor the cache's capacity, reruns are bit-identical, and selecting every page equals ``pages=None`` bit for bit.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the last T tokens of each sequence, causal among themselves.
        k_cache, v_cache: [N, Hkv, S, D].
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache, those of q included.
        pages: int32 [B, Hs, K] or [B, T, Hs, K], Hs = Hkv or Hq, logical pages without repetition, -1 where there is
            none; any other source than :func:`topk_pages` will do. None: dense paged attention by the same kernel.
        scale: of the scores before the softmax, 1 / sqrt(D) by default.

    Returns:
        out like q, and lse, float32 [B, Hq] or [B, T, Hq]: the natural-log sum of exponentials of the scaled scores.
        A row with nothing to attend to, or whose scores are all -inf, gives 0 and -inf.
    """
    out, lse = _ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's whole step: append_kv, estimate, topk_pages and sparse_decode, with their results bit for bit.

    On a GPU one kernel where it can be: one new token in fp16 or bf16, at most 8 query heads a KV head, "max" or "sum"
    ("none" too where each KV head has one query head), recent_pages >= 1, at most 256 sequences, all aligned to 16
    bytes, and 768 bytes of shared memory a head dimension. Else the four in a row.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the T new tokens of each sequence.
        k, v: [B, T, Hkv, D], T = 1 where q has no such dimension. Keys with RoPE applied.
        k_cache, v_cache, k_bounds, k_scales: as in :func:`append_kv`, written.
        page_table: [B, P] int32.
        start_lens: [B] int32, tokens in the cache before the call.
        seq_lens: [B] int32, ``start_lens + T``.
        num_pages: K, pages to read, as ``k`` of :func:`topk_pages`.
        group_reduce, sink_pages, recent_pages: as in :func:`topk_pages`.
        scale: of the scores before the softmax, 1 / sqrt(D) by default.

    Returns:
        out and lse of :func:`sparse_decode`, and the pages that :func:`topk_pages` selected.
    """
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
    )
    return out, lse, pages


def _group_reduce(name: str) -> int:
    if name not in GROUP_REDUCE:
        raise ValueError(f"group_reduce must be one of {', '.join(GROUP_REDUCE)}, got {name!r}")
    return GROUP_REDUCE[name]
