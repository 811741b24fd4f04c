"""Dense attention by PyTorch's own kernels: what a prefill is left to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, tokens, D] -> [B, T, Hq, D], causal where there is no mask."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # No fused CUDA kernel takes groups with a mask or in float32; the fallback would hold all scores in memory.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    causal, gqa = mask is None, group > 1
    out = scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)
