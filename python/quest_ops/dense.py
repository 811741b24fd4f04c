"""Dense attention for all that the operators do not cover: prefill, sliding windows, logit soft-capping, sinks.

PyTorch's ``scaled_dot_product_attention`` computes it wherever it supports the layer's features. Masks are made for a
block of queries at a time, so none has the size of the prompt squared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

# Queries that share a mask: at most _BLOCK, and fewer where a mask would have more than _BLOCK_ELEMENTS elements. Where
# scores are materialised, they count in place of the mask.
_BLOCK, _BLOCK_ELEMENTS = 512, 2**25


class Features(NamedTuple):
    """The attention that a layer needs.

    Attributes:
        scale: of the scores before the softmax, None: 1 / sqrt(D).
        window: tokens that a token sees, itself included; None: all.
        softcap: scores s become ``softcap * tanh(s / softcap)``.
        sinks: [Hq], for each head a logit that enters the softmax without a value.
        dropout: probability of dropping a weight.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def materialises_scores(self) -> bool:
        """Whether PyTorch's fused attention lacks a feature, so that the scores are held in memory."""
        return self.softcap is not None or self.sinks is not None


class Past(NamedTuple):
    """Tokens of a cache, contiguous.

    Attributes:
        k, v: [B, Hkv, L, D].
        position: [B, L], the position of each token in its sequence; -1 where there is no token.
        length: [B], tokens of each sequence.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    length: Tensor


def past_of_pages(keys_and_values: Iterable[Tensor], seq_lens: Tensor) -> Past:
    """A contiguous copy of each sequence's pages.

    Args:
        keys_and_values: two tensors [B, P, Hkv, S, D], the first P logical pages of each sequence. An iterator may
            gather one after the other, so that both need not lie in memory twice.
        seq_lens: [B].
    """
    k, v = (pages.transpose(1, 2).flatten(2, 3) for pages in keys_and_values)
    place = torch.arange(k.shape[2], device=k.device)
    return Past(k, v, torch.where(place < seq_lens[:, None], place, -1), seq_lens)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    features: Features,
    past: Past | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens to themselves, causal unless ``visible`` is given, and to earlier tokens.

    Args:
        q: [B, Hq, T, D], the new tokens' queries.
        k, v: [B, Hkv, T, D], their keys and values.
        real: int32 [B], the number of real tokens of each row, its last ones; None: all. A padding token sees itself,
            so that no row of a mask is empty.
        features: of the layer.
        past: earlier tokens, or None.
        visible: bool [B or 1, 1, T, T], the new tokens that each new token sees; None: causal, within the window.

    Returns:
        [B, T, Hq, D].
    """
    tokens, window = q.shape[2], features.window
    before = 0
    if past is not None:
        before = past.k.shape[2]
        k, v = torch.cat([past.k, k], 2), torch.cat([past.v, v], 2)
    block = _block_size(q, k, features)
    needs_mask = past is not None or real is not None or visible is not None
    needs_mask = needs_mask or (window is not None and tokens > window)
    if not needs_mask and (tokens <= block or not features.materialises_scores):
        return attend(q, k, v, None, features)
    place = torch.arange(tokens, device=q.device)
    padding = None if real is None else (tokens - real)[:, None, None]
    outs = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        first, last = 0, tokens
        if visible is None:
            first, last = 0 if window is None else max(0, start - window + 1), end
        query, key = place[start:end, None], place[first:last]
        if visible is not None:
            mask = visible[:, 0, start:end]
        else:
            mask = (key <= query)[None]
            if window is not None:
                mask = mask & (key > query - window)
        if padding is not None:
            mask = (mask & (key >= padding)) | (key == query)
        if past is not None and first == 0:
            mask = torch.cat(_same_rows(_visible_past(past, query, padding, window), mask), -1)
            keys, values = k[:, :, : before + last], v[:, :, : before + last]
        else:
            keys, values = k[:, :, before + first : before + last], v[:, :, before + first : before + last]
        outs.append(attend(q[:, :, start:end], keys, values, mask[:, None], features))
    return torch.cat(outs, 1)


def last_positions(seq_lens: Tensor, tokens: int) -> Tensor:
    """[B, T]: the positions of the last ``tokens`` tokens of each sequence."""
    return seq_lens[:, None] - torch.arange(tokens, 0, -1, device=seq_lens.device)


def attend_by_position(q: Tensor, past: Past, position: Tensor, features: Features) -> Tensor:
    """Causal attention of tokens that the cache already holds.

    Args:
        q: [B, Hq, T, D].
        past: the cache's tokens, those of q included.
        position: [B, T], the position of each query in its sequence; negative ones count as 0.
        features: of the layer.

    Returns:
        [B, T, Hq, D].
    """
    block = _block_size(q, past.k, features)
    key = past.position[:, None]
    outs = []
    for start in range(0, q.shape[2], block):
        query = position[:, start : start + block, None].clamp(min=0)
        mask = (key >= 0) & (key <= query)
        if features.window is not None:
            mask = mask & (key > query - features.window)
        outs.append(attend(q[:, :, start : start + block], past.k, past.v, mask[:, None], features))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features) -> Tensor:
    """Attention under a mask.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, L, D].
        mask: bool [B or 1, 1, T, L], True where a query sees a key; None: causal, with L = T.
        features: of the layer; the window is the mask's business.

    Returns:
        [B, T, Hq, D].
    """
    if features.materialises_scores:
        return _materialised(q, k, v, mask, features)
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # No fused CUDA kernel takes groups with a mask or in float32, and the fallback would materialise all scores.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    causal, gqa = mask is None, group > 1
    out = scaled_dot_product_attention(q, k, v, mask, features.dropout, causal, scale=features.scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _materialised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features) -> Tensor:
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    scale = q.shape[-1] ** -0.5 if features.scale is None else features.scale
    scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2)  # [B, Hkv, G, T, L]
    scores = scores.flatten(1, 2).float() * scale
    if features.softcap is not None:
        scores = torch.tanh(scores / features.softcap) * features.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if features.sinks is not None:
        sinks = features.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    weights = dropout(weights, features.dropout)
    out = weights.unflatten(1, (k.shape[1], -1)) @ v[:, :, None]
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def _visible_past(past: Past, query: Tensor, padding: Tensor | None, window: int | None) -> Tensor:
    """Bool [B, T or 1, L]: the tokens of the past that each query sees."""
    position = past.position[:, None, :]
    visible = position >= 0
    if window is None:
        return visible.expand(-1, query.shape[0], -1)
    now = past.length[:, None, None] + query - (0 if padding is None else padding)
    return visible & (position > now - window)


def _same_rows(*masks: Tensor) -> tuple[Tensor, ...]:
    rows = max(mask.shape[0] for mask in masks)
    return tuple(mask.expand(rows, -1, -1) for mask in masks)


def _block_size(q: Tensor, k: Tensor, features: Features) -> int:
    per_query = q.shape[0] * k.shape[2] * (q.shape[1] if features.materialises_scores else 1)
    return max(16, min(_BLOCK, _BLOCK_ELEMENTS // per_query))
