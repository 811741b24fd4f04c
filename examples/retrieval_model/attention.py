"""Causal attention within each packed document."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .device import COMPUTE, DEVICE


class PackedFlashAttention(torch.autograd.Function):
    """Causal attention within each packed document, by torch's own flash kernels."""

    @staticmethod
    def forward(ctx, q, k, v, starts, longest):
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, starts)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, seed, offset, starts = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, starts, starts, ctx.longest, ctx.longest, 0.0, True, seed, offset
        )
        return (*grads, None, None)


def attention_by_document(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """The same, document by document: for CPUs, and to check the kernels."""
    bounds = starts.tolist()
    outs = []
    for first, last in itertools.pairwise(bounds):
        one = [tensor[first:last].transpose(0, 1)[None] for tensor in (q, k, v)]
        outs.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Attend: q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]."""
    if q.is_cuda:
        return PackedFlashAttention.apply(q, k, v, starts, longest)
    return attention_by_document(q, k, v, starts)


def check_attention() -> None:
    """Compare the flash kernels, which are called below PyTorch's public interface, with attention by document."""
    q, k, v = (torch.randn(512, n, 64, device=DEVICE, dtype=COMPUTE, requires_grad=True) for n in (8, 2, 2))
    starts, grad = torch.tensor([0, 200, 512], dtype=torch.int32, device=DEVICE), torch.randn_like(q)
    out = PackedFlashAttention.apply(q, k, v, starts, 512)
    expected = attention_by_document(q.float(), k.float(), v.float(), starts)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad.float()),
        strict=True,
    )
    errors = [((ours - theirs).float().norm() / theirs.float().norm()).item() for ours, theirs in pairs]
    if max(errors) > 0.02:
        raise RuntimeError(f"packed attention is wrong: relative errors of out, dq, dk, dv {errors}")
