"""The decode steps that the benchmark times, with the bytes that each must read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from quest_ops.bounds import BoundsKind, bytes_of_bounds

SPARE_MEMORY = 0.8  # of the GPU's free memory, for the inputs of one workload
COPIES = 2.2  # of a layer's keys and values: the pages, the dense peers' contiguous copy, and the rest


@dataclass(frozen=True)
class Workload:
    """One decode step of one layer. budget: tokens; None selects every page through the same operators."""

    heads: int
    kv_heads: int
    context: int
    budget: int | None
    batch: int = 1
    page_size: int = 16
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    selection: str = "random"
    bounds: BoundsKind = "int8"
    std_factor: float | None = None

    @property
    def pages(self) -> int:
        return self.context // self.page_size

    @property
    def selected(self) -> int:
        return self.pages if self.budget is None else min(self.pages, self.budget // self.page_size)

    @property
    def token_bytes(self) -> int:
        """Keys of one token, all sequences and KV heads."""
        return self.batch * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bounds_bytes(self) -> int:
        page = bytes_of_bounds(self.head_dim, self.bounds, self.dtype)
        return self.batch * self.pages * self.kv_heads * page

    @property
    def sparse_bytes(self) -> int:
        """Bounds of all pages, keys and values of the selected ones."""
        return self.bounds_bytes + 2 * self.selected * self.page_size * self.token_bytes

    @property
    def dense_bytes(self) -> int:
        return 2 * self.context * self.token_bytes

    def __str__(self) -> str:
        extra = [f"page {self.page_size}"] * (self.page_size != 16) + [f"D {self.head_dim}"] * (self.head_dim != 128)
        extra += {"cache": ["16-bit bounds"], "int8": [], "int4": ["4-bit bounds"]}[self.bounds]
        extra += ["mean and std"] * (self.std_factor is not None)
        extra += ["fp16"] * (self.dtype == torch.float16) + [self.selection] * (self.selection != "random")
        budget = "all" if self.budget is None else str(self.budget)
        return ", ".join([f"{self.heads}/{self.kv_heads} B {self.batch}, {self.context}, {budget}", *extra])


MHA, GQA = Workload(32, 32, 32768, 2048), Workload(32, 8, 32768, 2048)
WIDE = Workload(64, 4, 32768, 2048)  # groups of 16 query heads
WITH_TARGETS = [
    MHA,
    replace(MHA, context=131072),
    GQA,
    replace(GQA, context=131072),
    replace(GQA, batch=8),
]


@dataclass(frozen=True)
class TopK:
    """topk_pages by itself: K pages of each of ``rows`` rows of n scores."""

    rows: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"topk_pages: {self.rows} x {self.n}, {self.k}"


TOPK = [TopK(32, 2048, 128), TopK(32, 65536, 256)]


def layers_that_fit(w: Workload) -> int:
    return int(torch.cuda.mem_get_info()[0] * SPARE_MEMORY / (COPIES * w.dense_bytes))


def largest_context(w: Workload) -> Workload:
    """The largest power of two of which two layers fit."""
    return replace(w, context=1 << int(math.log2(layers_that_fit(replace(w, context=1)) / 2)))


def all_workloads() -> list[Workload]:
    more = [replace(w, context=c) for w in (MHA, GQA) for c in (2048, 8192)]
    more += [replace(GQA, context=524288), replace(GQA, context=8192, batch=32), replace(GQA, batch=32)]
    more += [replace(w, budget=b) for w in (MHA, GQA) for b in (512, 1024, 4096)]
    more += [replace(GQA, context=c, budget=None) for c in (2048, 8192, 32768)]
    more += [replace(GQA, page_size=s) for s in (32, 64)]
    more += [replace(w, page_size=8, context=c) for w in (MHA, GQA) for c in (32768, 131072)]
    more += [replace(w, bounds="cache") for w in WITH_TARGETS]
    more += [
        replace(w, page_size=s, bounds="int4", std_factor=1.0, context=c, budget=b)
        for w in (MHA, GQA)
        for c in (32768, 131072)
        for s in (8, 16)
        for b in (512, 1024, 2048)
    ]
    more += [replace(MHA, bounds="int4", std_factor=1.0, budget=b) for b in (1536, 1792)]
    more += [replace(w, std_factor=1.0) for w in (MHA, GQA)]
    default = {"bounds": "int4", "std_factor": 1.0, "budget": 1024}
    more += [replace(WIDE, context=c, **default) for c in (32768, 131072)]
    more += [replace(w, page_size=4, **default) for w in (MHA, GQA)]
    more += [replace(GQA, dtype=torch.float16), replace(GQA, head_dim=64), replace(GQA, selection="clustered")]
    return [*WITH_TARGETS, *more, largest_context(GQA)]


def named(names: list[str], texts: list[str]) -> set[str]:
    """The names that the texts ask for: the one equal to a text, else all that contain it.

    Raises:
        ValueError: a text asks for no name.
    """
    found: set[str] = set()
    for text in texts:
        matches = {text} & set(names) or {name for name in names if text in name}
        if not matches:
            raise ValueError(f"no workload is named {text!r}; there are: {'; '.join(names)}")
        found |= matches
    return found
