"""Counters of the attention of each layer: steps, pages and bytes, sparse against dense.

A cache counts from ``start_report()`` on; before it nothing is computed. Each attention call adds to the
:class:`Counters` of its layer by device operations. So counting works under torch.compile and in CUDA graphs, if it is
started before compiling or capturing, and it never waits for the device. Reading the counters does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import BoundsKind, bytes_of_bounds
from .codes import bytes_of_codes


class Counters(NamedTuple):
    """The counters of a layer. Pages are counted once a sequence, new token and head.

    Attributes:
        prefills: prefill calls.
        steps: decoding calls.
        pages_read: over the heads with a page list of their own, Hs.
        pages_held: over the same heads.
        kv_head_pages_held: over the KV heads, the pages that dense attention reads.
        bounds_read: over the KV heads, pages whose bounds were read.
        codes_read: over the heads with a page list of their own, pages whose key codes were read.
    """

    prefills: int
    steps: int
    pages_read: int
    pages_held: int
    kv_head_pages_held: int
    bounds_read: int
    codes_read: int


# The place of each counter in a layer's row on the device.
_PLACE = Counters(*range(len(Counters._fields)))


class LayerPlan(NamedTuple):
    """How a layer decodes, and why."""

    layer: int
    path: str  # "sparse", "dense", or "none" without attention
    reason: str


@dataclass(frozen=True)
class LayerCounts:
    """One layer since ``start_report()``. Pages are counted once a sequence, new token and head with a page list.

    Attributes:
        plan: how the layer decodes, and why.
        prefills: calls with more new tokens than a decode step takes; always dense.
        steps: decoding calls.
        pages_read, pages_held: pages of the decoding calls.
        bytes_read: of the keys and values of the pages read, and of the bounds of all pages held where Quest selects.
            Where it selects twice, the codes of the candidates count too.
            The bytes that ``QuestConfig.selector`` reads are not known.
        bytes_dense: of the keys and values of the pages held.
    """

    plan: LayerPlan
    prefills: int
    steps: int
    pages_read: int
    pages_held: int
    bytes_read: int
    bytes_dense: int

    @property
    def share(self) -> float:
        """Bytes read over those of dense attention; 1 where nothing was decoded."""
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
        words = (1, len(widths) - 1)  # these columns are aligned left, numbers right
        return "\n".join(
            "  ".join(f"{cell:{'<' if i in words else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
            for row in rows
        )


class AttentionCounts:
    """The counters of all layers, on the device.

    Args:
        num_layers, num_kv_heads, head_dim, page_size, dtype, device, bounds: the cache's.
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
        self._codes_bytes = page_size * bytes_of_codes(head_dim)
        self._counts = torch.zeros((num_layers, len(Counters._fields)), dtype=torch.int64, device=device)
        if self._counts.is_cuda:  # compiled CUDA graphs then write it in place
            from torch._dynamo import mark_static_address  # slow to import

            mark_static_address(self._counts, guard=False)

    def record_prefill(self, layer: int) -> None:
        self._counts[layer, _PLACE.prefills].add_(1)

    def record_step(self, layer: int) -> None:
        """Count a decoding call of a layer that keeps no pages."""
        self._counts[layer, _PLACE.steps].add_(1)

    def record(
        self,
        layer: int,
        pages: Tensor | None,
        seq_lens: Tensor,
        num_new: int,
        reads_bounds: bool = True,
        candidate_pages: int = 0,
        selects: Tensor | None = None,
    ) -> None:
        """Count one decoding call.

        Args:
            layer: index of the layer.
            pages: the pages read, int32 [B, Hs, K] or [B, T, Hs, K]; None: all.
            seq_lens: [B] int32, tokens in the cache.
            num_new: T.
            reads_bounds: whether ``pages`` were selected by their bounds.
            candidate_pages: most pages of the first of two selections; 0 where there is one.
            selects: bool [B], the sequences whose bounds were read; None: all.
        """
        behind = torch.arange(num_new, dtype=torch.int32, device=seq_lens.device)
        visible = (seq_lens[:, None] - behind).clamp(min=0)
        each = torch.div(visible + (self.page_size - 1), self.page_size, rounding_mode="floor")
        held = each.sum()
        counts, all_heads = self._counts[layer], held * self.num_kv_heads
        counts[_PLACE.steps].add_(1)
        counts[_PLACE.pages_read].add_(all_heads if pages is None else (pages >= 0).sum())
        counts[_PLACE.pages_held].add_(all_heads if pages is None else held * pages.shape[-2])
        counts[_PLACE.kv_head_pages_held].add_(all_heads)
        if pages is not None and reads_bounds:
            read = held if selects is None else (each * selects[:, None]).sum()
            counts[_PLACE.bounds_read].add_(read * self.num_kv_heads)
        if pages is not None and candidate_pages:
            counts[_PLACE.codes_read].add_(each.clamp(max=candidate_pages).sum() * pages.shape[-2])

    def reset(self) -> None:
        """Set all counters to 0."""
        self._counts.zero_()

    def read(self, plans: Sequence[LayerPlan]) -> Report:
        """The counts of the layers of ``plans``. Synchronises."""
        report = Report()
        for plan in plans:
            counts = Counters(*self._counts[plan.layer].tolist())
            bytes_read = counts.pages_read * self._page_bytes + counts.bounds_read * self._bounds_bytes
            bytes_read += counts.codes_read * self._codes_bytes
            bytes_dense = counts.kv_head_pages_held * self._page_bytes
            report.append(LayerCounts(plan, *counts[:4], bytes_read, bytes_dense))
        return report
