"""The operators in plain PyTorch, in the cache's dtype: the measure of the kernels' errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from quest_ops.reference import num_pages, unpack, visible_tokens
from torch import Tensor

RUNS = 4


def in_several_orders(compute: Callable[..., Any], q: Tensor, k: Tensor, *arguments: Any) -> list[Tensor]:
    """Each result of ``compute`` with the head dimension summed in several orders, stacked.

    In float32 the largest error varies with the order of summation, so a single order is too small a sample.
    """
    random = torch.Generator().manual_seed(0)
    if k.dtype == torch.uint8:  # page bounds of 4 bits
        k = unpack(k)
    orders = [torch.randperm(q.shape[-1], generator=random) for _ in range(RUNS)]
    runs = [compute(q[..., order], k[..., order], *arguments) for order in orders]
    return [torch.stack(run) for run in zip(*runs, strict=True)]


def estimate(
    q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k_scales: Tensor | None = None,
) -> tuple[Tensor]:
    if k_scales is not None:
        k_bounds = k_bounds.to(q.dtype) * k_scales[..., None, None].to(q.dtype)
    if q.dim() == 3:
        (scores,) = estimate(q[:, None], k_bounds, page_table, seq_lens, page_size)
        return (scores[:, 0],)
    B, T, Hq, _ = q.shape
    scores = torch.full((B, T, Hq, page_table.shape[1]), -math.inf, dtype=q.dtype)
    for b, length in enumerate(seq_lens.tolist()):
        n = num_pages(length, page_size)
        bounds = k_bounds[page_table[b, :n].long()].transpose(0, 1)
        lower, upper = bounds.repeat_interleave(Hq // k_bounds.shape[1], 0).unbind(2)  # [Hq, n, D]
        for t in range(T):
            query = q[b, t, :, None]
            n = num_pages(visible_tokens(length, t, T), page_size)
            scores[b, t, :, :n] = torch.maximum(query * lower, query * upper).sum(-1)[:, :n]
    return (scores,)


def rerank_pages(
    rotated: Tensor,
    levels: Tensor,
    code_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor,
    token_reduce: str,
    scale: float,
) -> tuple[Tensor]:
    """With queries that are rotated already, in the case's dtype. Sums are float32, and so are the scores."""
    where = (levels, code_scales, page_table, seq_lens)
    if rotated.dim() == 3:
        (scores,) = rerank_pages(rotated[:, None], *where, pages[:, None], token_reduce, scale)
        return (scores[:, 0],)
    B, T, Hq, _ = rotated.shape
    page_size, kv_group, list_group = levels.shape[2], Hq // levels.shape[1], Hq // pages.shape[2]
    scores = torch.full((B, T, Hq, page_table.shape[1]), -math.inf)
    for b, length in enumerate(seq_lens.tolist()):
        used = page_table[b, : num_pages(length, page_size)].long()
        position = torch.arange(len(used) * page_size).view(-1, page_size)
        for t in range(T):
            visible = visible_tokens(length, t, T)
            n = num_pages(visible, page_size)
            for h in range(Hq):
                keys = levels[used[:n], h // kv_group].float()
                tokens = keys @ rotated[b, t, h].float() * code_scales[used[:n], h // kv_group]
                tokens = tokens.masked_fill(position[:n] >= visible, -math.inf)
                best = tokens.amax(-1) if token_reduce == "max" else (tokens * scale).logsumexp(-1) / scale
                chosen = [page for page in pages[b, t, h // list_group].tolist() if 0 <= page < n]
                scores[b, t, h, chosen] = best[chosen]
    return (scores,)


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention over each gathered sequence, masked to the selected pages."""
    if q.dim() == 3:
        pages = None if pages is None else pages[:, None]
        out, lse = sparse_decode(q[:, None], k_cache, v_cache, page_table, seq_lens, pages, scale)
        return out[:, 0], lse[:, 0]
    B, T, Hq, D = q.shape
    Hkv, page_size = k_cache.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    out, lse = torch.zeros_like(q), torch.full((B, T, Hq), -math.inf, dtype=q.dtype)
    for b, length in enumerate(seq_lens.tolist()):
        n = num_pages(length, page_size)
        used = page_table[b, :n].long()
        mask = torch.zeros(Hq, T, n, dtype=torch.bool)
        for t in range(T):
            for h in range(Hq):
                chosen = range(n) if pages is None else pages[b, t, h * pages.shape[2] // Hq].tolist()
                mask[h, t, [page for page in chosen if 0 <= page < n]] = True
        mask = mask.repeat_interleave(page_size, 2)  # [Hq, T, n * S]
        visible = torch.tensor([visible_tokens(length, t, T) for t in range(T)])
        mask &= torch.arange(n * page_size) < visible[:, None]
        keys, values = (x[used].transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (k_cache, v_cache))
        keys, values = (x.repeat_interleave(Hq // Hkv, 0) for x in (keys, values))  # [Hq, n * S, D]
        scores = (q[b].transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(~mask, -math.inf)
        seen = mask.any(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(~seen, 0)
        values = values.masked_fill(~mask.any(1)[..., None], 0)  # 0 * NaN is NaN
        out[b] = (weights @ values).transpose(0, 1)
        lse[b] = scores.logsumexp(-1).T
    return out, lse
