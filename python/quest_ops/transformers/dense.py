"""Dense attention for what the operators do not take: prefill, sliding windows, logit soft-capping.

By PyTorch's ``scaled_dot_product_attention`` wherever that can express it. Masks are made for a block of queries at a
time, so that none has the size of the prompt squared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dense import dense_attention

# Queries that share a mask; fewer where the mask, or the scores where there are any, would be larger than this.
_BLOCK, _BLOCK_ELEMENTS = 512, 2**25


class Features(NamedTuple):
    """What a layer asks of its attention."""

    scale: float
    window: int | None = None  # tokens a token sees, itself included
    softcap: float | None = None
    sinks: Tensor | None = None  # [Hq], a logit of each head that takes part in the softmax and has no value
    dropout: float = 0.0


class Past(NamedTuple):
    """Tokens of the cache that come before the step's: k, v [B, Hkv, L, D] and where they are, [B, L], -1: nowhere."""

    k: Tensor
    v: Tensor
    position: Tensor
    length: Tensor  # [B]


def prefill(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, features: Features, past: Past | None = None
) -> Tensor:
    """Causal attention of new tokens to themselves and to what came before: q [B, Hq, T, D] -> [B, T, Hq, D].

    Args:
        q, k, v: of the new tokens.
        real: int32 [B], how many of a row's tokens are real, its last ones; None: all. Padding sees itself.
        features: of the layer.
        past: earlier tokens, or None.
    """
    tokens, window = q.shape[2], features.window
    if past is None and real is None and (window is None or tokens <= window):
        return attend(q, k, v, None, features)
    before = 0
    if past is not None:
        before = past.k.shape[2]
        k, v = torch.cat([past.k, k], 2), torch.cat([past.v, v], 2)
    place = torch.arange(tokens, device=q.device)
    padding = None if real is None else (tokens - real)[:, None, None]
    block = _block_size(q, k, features)
    outs = []
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        query, key = place[start:end, None], place[first:end]
        mask = (key <= query)[None]
        if window is not None:
            mask = mask & (key > query - window)
        if padding is not None:
            mask = (mask & (key >= padding)) | (key == query)
        if past is not None and first == 0:
            mask = torch.cat(_same_rows(_visible_past(past, query, padding, window), mask), -1)
            keys, values = k[:, :, : before + end], v[:, :, : before + end]
        else:
            keys, values = k[:, :, before + first : before + end], v[:, :, before + first : before + end]
        outs.append(attend(q[:, :, start:end], keys, values, mask[:, None], features))
    return torch.cat(outs, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features) -> Tensor:
    """One attention: q [B, Hq, T, D], k and v [B, Hkv, L, D], mask bool [B or 1, 1, T, L] -> [B, T, Hq, D].

    Without a mask it is causal, L = T.
    """
    if features.softcap is not None or features.sinks is not None:
        return _by_hand(q, k, v, mask, features)
    return dense_attention(q, k, v, mask, features.scale, features.dropout)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features) -> Tensor:
    tokens = q.shape[2]
    if mask is None:
        block = _block_size(q, k, features)
        if tokens > block:
            place = torch.arange(tokens, device=q.device)
            parts = [
                _by_hand(
                    q[:, :, i : i + block],
                    k[:, :, : i + block],
                    v[:, :, : i + block],
                    (place[: i + block] <= place[i : i + block, None])[None, None],
                    features,
                )
                for i in range(0, tokens, block)
            ]
            return torch.cat(parts, 1)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[None, None]
    scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2)  # [B, Hkv, G, T, L]
    scores = scores.flatten(1, 2).float() * features.scale
    if features.softcap is not None:
        scores = torch.tanh(scores / features.softcap) * features.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if features.sinks is not None:
        sinks = features.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    weights = torch.nn.functional.dropout(weights, features.dropout)
    out = weights.unflatten(1, (k.shape[1], -1)) @ v[:, :, None]
    return out.flatten(1, 2).transpose(1, 2).contiguous()


def _visible_past(past: Past, query: Tensor, padding: Tensor | None, window: int | None) -> Tensor:
    """[B, T or 1, L]: the tokens of the past that each query sees."""
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
    by_hand = features.softcap is not None or features.sinks is not None
    per_query = q.shape[0] * k.shape[2] * (q.shape[1] if by_hand else 1)
    return max(16, min(_BLOCK, _BLOCK_ELEMENTS // per_query))
