"""What ran sparse and what ran dense, layer by layer: counted on the device, read only when it is printed.

A cache counts from ``start_report()`` on. Each attention call then adds to four integers of its layer by device
operations, so counting works under torch.compile and in CUDA graphs (start it before compiling or capturing) and never
waits for the device; without it nothing is computed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import BoundsKind, bytes_of_bounds


class LayerPlan(NamedTuple):
    """How a layer decodes, and why."""

    layer: int
    path: str  # "sparse" or "dense"
    reason: str


@dataclass(frozen=True)
class LayerCounts:
    """One layer since ``start_report()``. Pages are counted a sequence, new token and list head."""

    plan: LayerPlan
    prefills: int  # calls with more new tokens than decoding takes: always dense
    steps: int  # decoding calls
    pages_read: int
    pages_held: int
    bytes_read: int  # keys and values of the pages read; in sparse layers the bounds of all pages held, too
    bytes_dense: int  # keys and values of the pages held

    @property
    def share(self) -> float:
        """Bytes read of what dense attention reads; 1 where nothing was decoded."""
        return self.bytes_read / self.bytes_dense if self.bytes_dense else 1.0


class Report(list[LayerCounts]):
    """The counts of the layers; prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "decodes", "prefills", "steps", "pages read", "of held", "MB read", "of dense", "why")]
        for x in self:
            held = f"{x.pages_read / x.pages_held:.1%}" if x.pages_held else "-"
            share = f"{x.share:.1%}" if x.bytes_dense else "-"
            counts = (str(x.prefills), str(x.steps), f"{x.pages_read:,}", held, f"{x.bytes_read / 1e6:,.2f}", share)
            rows.append((str(x.plan.layer), x.plan.path, *counts, x.plan.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        words = (1, len(widths) - 1)  # to the left; numbers to the right
        return "\n".join(
            "  ".join(f"{cell:{'<' if i in words else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
            for row in rows
        )


class AttentionCounts:
    """The device's counters of the attention calls of each layer.

    Args:
        num_layers, num_kv_heads, head_dim, page_size, dtype, device, bounds: those of the cache.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        bounds: BoundsKind = "cache",
    ) -> None:
        self.num_kv_heads, self.page_size = num_kv_heads, page_size
        self._page_bytes = 2 * page_size * head_dim * dtype.itemsize
        self._bounds_bytes = bytes_of_bounds(head_dim, bounds, dtype)
        # Of each layer: prefills; decoding steps; pages read and held, over the lists; pages held, over the KV heads;
        # pages whose bounds were read.
        self._counts = torch.zeros((num_layers, 6), dtype=torch.int64, device=device)
        if self._counts.is_cuda:  # compiled CUDA graphs write it in place
            from torch._dynamo import mark_static_address  # slow to import

            mark_static_address(self._counts, guard=False)

    def record_prefill(self, layer: int) -> None:
        self._counts[layer, 0].add_(1)

    def record_step(self, layer: int) -> None:
        """Count a decoding call of a layer that keeps no pages."""
        self._counts[layer, 1].add_(1)

    def record(self, layer: int, pages: Tensor | None, seq_lens: Tensor, num_new: int) -> None:
        """Count one decoding call.

        Args:
            layer: index of the layer.
            pages: what it read, int32 [B, Hs, K] or [B, T, Hs, K], or None where it read everything.
            seq_lens: [B] int32, tokens in the cache.
            num_new: T.
        """
        behind = torch.arange(num_new, dtype=torch.int32, device=seq_lens.device)
        visible = (seq_lens[:, None] - behind).clamp(min=0)
        held = torch.div(visible + (self.page_size - 1), self.page_size, rounding_mode="floor").sum()
        counts, all_heads = self._counts[layer], held * self.num_kv_heads
        counts[1].add_(1)
        counts[2].add_(all_heads if pages is None else (pages >= 0).sum())
        counts[3].add_(all_heads if pages is None else held * pages.shape[-2])
        counts[4].add_(all_heads)
        if pages is not None:
            counts[5].add_(all_heads)

    def reset(self) -> None:
        """Count from nothing again."""
        self._counts.zero_()

    def read(self, plans: Sequence[LayerPlan]) -> Report:
        """The counts, with how each layer decodes. Waits for the device."""
        report = Report()
        for plan in plans:
            prefills, steps, read, held, held_by_kv_heads, bounds = self._counts[plan.layer].tolist()
            bytes_read = read * self._page_bytes + bounds * self._bounds_bytes
            report.append(
                LayerCounts(plan, prefills, steps, read, held, bytes_read, held_by_kv_heads * self._page_bytes)
            )
        return report
