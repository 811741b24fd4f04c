"""Page summaries in plain PyTorch: two vectors a page, from which a query scores it.

Minimum and maximum are Quest's (Tang et al., ICML 2024). Mean and standard deviation are those of UNIQUE (2026).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

#: "minmax": the box of a page's keys. "mean_std": the box ``mean ± std``. "mean_var": mean and standard deviation. The
#: score is then that of ``q . k`` with its own standard deviation, as if the dimensions were independent.
Summary = Literal["minmax", "mean_std", "mean_var"]


def summarise(keys: Tensor, kind: Summary, factor: float, bits: int | None) -> Tensor:
    """The summaries of pages, as a kernel would read them back from memory.

    Args:
        keys: [..., n, D], the n keys of each page.
        kind: "minmax" has as centre c and half width w those of the keys' box, the others mean and standard deviation
            (divided by n). Boxes are stored as ``c - factor * w`` and ``c + factor * w``, "mean_var" as c and
            ``factor * w``.
        factor: of the half width.
        bits: 8 or 4: whole numbers with one float32 scale a page, see :func:`quantise`; None: the dtype of the keys.

    Returns:
        float32 [..., 2, D].
    """
    x = keys.float()
    if kind == "minmax":
        lower, upper = x.amin(-2), x.amax(-2)
        if factor != 1:
            centre, width = (lower + upper) / 2, (upper - lower) / 2 * factor
            lower, upper = centre - width, centre + width
        pair = torch.stack([lower, upper], -2)
    else:
        mean = x.mean(-2)
        width = (x - mean[..., None, :]).square().mean(-2).sqrt() * factor
        pair = torch.stack([mean, width] if kind == "mean_var" else [mean - width, mean + width], -2)
    if bits is None:
        return pair.to(keys.dtype).float()
    return quantise(pair, bits, outward=kind == "minmax" and factor == 1)


def quantise(pair: Tensor, bits: int, outward: bool) -> Tensor:
    """Two vectors [..., 2, D] rounded to whole numbers of ``bits`` bits times their common scale.

    The scale is ``largest magnitude / (2 ** (bits - 1) - 1)``, a float32 for both vectors.

    Args:
        pair: float32.
        bits: 8 or 4.
        outward: round the first vector down and the second up, as bounds must be; else to the nearest.
    """
    most = 2 ** (bits - 1) - 1
    scale = (pair.abs().amax((-2, -1), keepdim=True) / most).clamp(min=torch.finfo(torch.float32).tiny)
    steps = pair / scale
    whole = torch.stack([steps[..., 0, :].floor(), steps[..., 1, :].ceil()], -2) if outward else steps.round()
    return whole.clamp(-most, most) * scale


def score(q: Tensor, summaries: Tensor, kind: Summary) -> Tensor:
    """A score for each page: q [B, Hq, D], summaries [B, Hkv, P, 2, D] -> float32 [B, Hq, P].

    A box scores ``sum_d max(q_d * lower_d, q_d * upper_d)``, which is ``q . centre + |q| . width``.
    "mean_var" scores ``q . mean + sqrt(q^2 . std^2)``.
    """
    first, second = summaries.unbind(3)
    grouped = q.float().unflatten(1, (first.shape[1], -1))  # [B, Hkv, G, D]
    if kind == "mean_var":
        spread = (grouped.square() @ second.square().transpose(-1, -2)).sqrt()
        return (grouped @ first.transpose(-1, -2) + spread).flatten(1, 2)
    scores = grouped.clamp(min=0) @ second.transpose(-1, -2) + grouped.clamp(max=0) @ first.transpose(-1, -2)
    return scores.flatten(1, 2)


class PageSummaries:
    """The summaries of a layer's pages, kept up to date as tokens arrive.

    Args:
        k: [B, Hkv, capacity, D], the layer's keys.
        tokens: those that are there already.
        page_size: S.
        kind, factor, bits: see :func:`summarise`.
    """

    def __init__(self, k: Tensor, tokens: int, page_size: int, kind: Summary, factor: float, bits: int | None) -> None:
        self._k, self._page_size = k, page_size
        self._how = kind, factor, bits
        self._summaries = k.new_zeros((*k.shape[:2], k.shape[2] // page_size, 2, k.shape[3]), dtype=torch.float32)
        full = tokens // page_size
        pages = k[:, :, : full * page_size].unflatten(2, (full, page_size))
        if full:
            self._summaries[:, :, :full] = summarise(pages, *self._how)
        if tokens % page_size:
            self.append(tokens)

    def append(self, tokens: int) -> None:
        """Take in the newest token, which makes the sequence ``tokens`` long."""
        page = (tokens - 1) // self._page_size
        keys = self._k[:, :, page * self._page_size : tokens]
        self._summaries[:, :, page] = summarise(keys, *self._how)

    def scores(self, q: Tensor, tokens: int) -> Tensor:
        """The scores of the pages in use: q [B, Hq, D] -> float32 [B, Hq, P]."""
        return score(q, self._summaries[:, :, : math.ceil(tokens / self._page_size)], self._how[0])


def page_bytes(head_dim: int, itemsize: int, bits: int | None) -> int:
    """Bytes of one page's summary for one KV head, its scale included."""
    return 2 * head_dim * itemsize if bits is None else 2 * head_dim * bits // 8 + 4
