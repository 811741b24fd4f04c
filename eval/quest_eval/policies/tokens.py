"""Attention over lists of tokens, in plain PyTorch, for policies that do not read pages."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(x: Tensor, tokens: Tensor) -> Tensor:
    """Keys or values of listed tokens: x [B, Hkv, L, D], tokens int64 [B, Hs, n] -> [B, Hs, n, D].

    Hs is Hkv, a multiple of it (a list a query head) or 1 (one list for all: the result has Hkv heads).
    """
    batch, kv_heads = x.shape[:2]
    heads = max(kv_heads, tokens.shape[1])
    row = torch.arange(batch, device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[:, None] // (heads // kv_heads)
    return x[row, head, tokens]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention in float32 of q [B, Hq, D] over k, v [B, H, n, D]: out like q, weights [B, Hq, n]."""
    weights = scores(q, k, scale).softmax(-1)
    out = weights.unflatten(1, (k.shape[1], -1)) @ v.float()
    return out.flatten(1, 2).to(q.dtype), weights


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores, float32 [B, Hq, n], of q [B, Hq, D] against k [B, H, n, D]."""
    grouped = q.unflatten(1, (k.shape[1], -1)).float()
    return (grouped @ k.float().transpose(-1, -2)).flatten(1, 2) * scale
