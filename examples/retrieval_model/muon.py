"""Muon (Jordan et al., 2024): momentum whose matrices are made nearly orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .device import COMPUTE


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton and Schulz's iteration, towards U V^T of each matrix's singular value decomposition U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(COMPUTE)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon:
    """For stacks of matrices [layers, out, in]."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float, momentum: float, decay: float) -> None:
        for parameter, average in zip(self.parameters, self.momenta, strict=True):
            average.lerp_(parameter.grad, 1 - momentum)
            update = orthogonalise(parameter.grad.lerp(average, momentum)).to(parameter.dtype)
            scale = max(1, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - rate * decay).add_(update, alpha=-rate * scale)
            parameter.grad = None
