"""Keys in 1 to 4 bits a dimension, by which a second stage scores single tokens.

A Hadamard rotation makes the elements of a key nearly Gaussian. Lloyd-Max levels are those of least squared error for a
Gaussian. The combination is that of QuIP# (Tseng et al., ICML 2024) and TurboQuant (Zandieh et al., 2025).
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

#: Bytes of a token's scale, a float16.
SCALE_BYTES = 2


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The ``2 ** bits`` levels of least squared error for a standard normal variable, ascending.

    Lloyd's algorithm: borders are midpoints of levels, and levels the means of the variable between borders.
    """
    count = 2**bits
    levels = [(2 * i + 1 - count) * 2 / count for i in range(count)]
    for _ in range(2000):
        borders = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        density = [math.exp(-(b**2) / 2) / math.sqrt(2 * math.pi) for b in borders]
        below = [(1 + math.erf(b / math.sqrt(2))) / 2 for b in borders]
        levels = [(density[i] - density[i + 1]) / (below[i + 1] - below[i]) for i in range(count)]
    return tuple(levels)


def hadamard(head_dim: int) -> Tensor:
    """An orthogonal float32 matrix [D, D]: Sylvester's, divided by the square root of its size.

    Where D is no power of two, blocks of the largest power of two that divides it stand on the diagonal.
    """
    size = head_dim & -head_dim
    block = torch.ones(1, 1)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / math.sqrt(size)] * (head_dim // size))


class KeyCodes:
    """The codes of a layer's keys, kept up to date as tokens arrive.

    A rotated key is its scale, the root mean square of its elements in float16, times the nearest levels.

    Args:
        k: [B, Hkv, capacity, D], the layer's keys.
        tokens: those that are there already.
        bits: 1 to 4, of an element.
    """

    def __init__(self, k: Tensor, tokens: int, bits: int) -> None:
        self._k = k
        self._rotation = hadamard(k.shape[3]).to(k.device)
        self._levels = torch.tensor(lloyd_max(bits), device=k.device)
        self._borders = (self._levels[1:] + self._levels[:-1]) / 2
        # Levels in the cache's dtype stand for their numbers: an emulation has no use for packed bits.
        self._codes = torch.zeros_like(k)
        self._scales = k.new_zeros((*k.shape[:3], 1), dtype=torch.float16)
        self._encode(slice(0, tokens))

    def append(self, tokens: int) -> None:
        """Take in the newest token, which makes the sequence ``tokens`` long."""
        self._encode(slice(tokens - 1, tokens))

    def scores(self, q: Tensor, tokens: int) -> Tensor:
        """Estimates of ``q . k`` for all tokens: q [B, Hq, D] -> float32 [B, Hq, tokens]."""
        rotated = (q.float() @ self._rotation).unflatten(1, (self._k.shape[1], -1))
        codes, scales = self._codes[:, :, :tokens], self._scales[:, :, :tokens].float()
        return (rotated @ codes.float().transpose(-1, -2) * scales.transpose(-1, -2)).flatten(1, 2)

    def _encode(self, where: slice) -> None:
        rotated = self._k[:, :, where].float() @ self._rotation
        scales = rotated.square().mean(-1, keepdim=True).sqrt().half()
        steps = rotated / scales.float().clamp(min=torch.finfo(torch.float16).tiny)
        self._codes[:, :, where] = self._levels[torch.bucketize(steps, self._borders)].to(self._codes.dtype)
        self._scales[:, :, where] = scales


def token_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one token's code for one KV head, its scale included."""
    return head_dim * bits // 8 + SCALE_BYTES
