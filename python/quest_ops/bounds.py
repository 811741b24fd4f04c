"""Page summaries other than the minimum and maximum, for the same :func:`quest_ops.estimate`.

The operator computes ``q+ . upper + q- . lower`` of whatever lies in k_bounds. With ``lower = mean - c * std`` and
``upper = mean + c * std`` of a page's keys that is ``q . mean + c * sum_d |q_d| std_d``: not an upper bound of q.k any
more, but less at the mercy of a single key, where Quest's own bounds (Tang et al., ICML 2024) grow loose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_mean_std_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    num_new: int | None = None,
    *,
    c: float = 1.0,
) -> None:
    """Write ``mean - c * std`` and ``mean + c * std`` of each page's keys in place of their minimum and maximum.

    The standard deviation is that of the keys in the page (divided by their number), so a single key has itself for
    both. Computed in float32 and rounded once. Waits for nothing: lengths are read on the device.

    Args:
        k_cache: [N, Hkv, S, D], float16, bfloat16 or float32.
        k_bounds: [N, Hkv, 2, D], written: [..., 0, :] the lower, [..., 1, :] the upper.
        page_table: [B, P] int32, logical to physical page.
        seq_lens: [B] int32, tokens in the cache, at least 1 each.
        num_new: only the pages of each sequence's last ``num_new`` tokens; None: all pages.
        c: standard deviations to either side, at least 0.

    Raises:
        ValueError: ``num_new`` or ``c`` out of its range, or k_bounds of another shape.
    """
    N, Hkv, S, D = k_cache.shape
    if list(k_bounds.shape) != [N, Hkv, 2, D]:
        raise ValueError(f"k_bounds must have shape {[N, Hkv, 2, D]} to go with k_cache, got {list(k_bounds.shape)}")
    if num_new is not None and num_new < 1:
        raise ValueError(f"num_new must be at least 1 or None, got {num_new}")
    if c < 0:
        raise ValueError(f"c must be at least 0, got {c}")
    P = page_table.shape[1]
    last = (seq_lens[:, None] - 1) // S
    # As many pages as there may be, so that no length is read by the host: those that are not there repeat a real one.
    if num_new is None:
        logical = torch.arange(P, device=page_table.device).minimum(last)
    else:
        count = min(P, (num_new + S - 2) // S + 1)
        logical = (last - torch.arange(count, device=page_table.device)).clamp(min=0)
    physical = page_table.gather(1, logical.long()).long()  # [B, pages]
    keys = k_cache[physical].float()  # [B, pages, Hkv, S, D]
    position = logical[..., None] * S + torch.arange(S, device=page_table.device)
    real = (position < seq_lens[:, None, None])[:, :, None, :, None]
    tokens = real.sum(3)  # [B, pages, 1, 1]
    keys = keys.where(real, 0)
    mean = keys.sum(3) / tokens
    deviation = (keys - mean[:, :, :, None]).where(real, 0)
    spread = c * (deviation.square().sum(3) / tokens).sqrt()
    k_bounds[physical] = torch.stack([mean - spread, mean + spread], 3).to(k_bounds.dtype)
