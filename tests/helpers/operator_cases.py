"""Shared by the operator tests: cases made from drawn integers, memory layouts, and the rule of comparison.

Hypothesis draws the integers of a :class:`Shape`, never elements. The tensors follow from its seed, on the CPU. Memory
that an operator must not read holds NaN, or invalid page numbers.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from quest_ops import reference
from quest_ops.bounds import BoundsKind, new_bounds
from quest_ops.ops import DTYPES, HEAD_DIMS, PAGE_SIZES
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "unaligned")
GARBAGE = 2**31 - 1
UNREAD_BYTE = 77
GUARD = 64  # elements before and after a placed tensor; keeps 16-byte alignment


class Kind(NamedTuple):
    """Of page bounds."""

    bounds: BoundsKind = "cache"
    std_factor: float | None = None

    @property
    def scaled(self) -> bool:
        return self.bounds != "cache"


KINDS = {
    "minmax": Kind(),
    "minmax-8-bit": Kind("int8"),
    "minmax-4-bit": Kind("int4"),
    "mean-std": Kind("cache", 1.0),
    "mean-std-8-bit": Kind("int8", 0.7),
    "mean-std-4-bit": Kind("int4", 1.0),
}


@dataclass(frozen=True)
class Shape:
    """The integers of a case."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    new_tokens: int = 0  # T; 0: q has no such dimension
    lengths: tuple[int, ...] = (37, 16)
    spare_pages: int = 1  # entries of the page table, and pages of the pool, that no sequence uses
    shared_pages: int = 0  # full first pages that all sequences share
    layouts: tuple[int, int, int, int] = (0, 0, 0, 0)  # of q, k_cache, v_cache, k_bounds with k_scales
    kind: Kind = KINDS["minmax"]
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def capacity(self) -> int:
        return max(reference.num_pages(n, self.page_size) for n in self.lengths) + self.spare_pages


class Case:
    """Random tensors of a shape: q, keys and values of each sequence, and the paged cache that holds them."""

    new_lens: Tensor | None = None  # of steps alone

    def __init__(self, shape: Shape):
        self.shape = s = shape
        self.random = torch.Generator().manual_seed(s.seed)
        batch, P = len(s.lengths), s.capacity
        new = (s.new_tokens,) if s.new_tokens else ()
        self.q = self.randn(batch, *new, s.heads, s.head_dim)
        self.keys = [self.randn(n, s.kv_heads, s.head_dim) for n in s.lengths]
        self.values = [self.randn(n, s.kv_heads, s.head_dim) for n in s.lengths]
        self.seq_lens = torch.tensor(s.lengths, dtype=torch.int32)
        pool = torch.randperm(batch * P + s.spare_pages, generator=self.random).int()
        self.page_table = pool[: batch * P].view(batch, P).clone()
        shared = min(s.shared_pages, min(s.lengths) // s.page_size)
        for b, length in enumerate(s.lengths):
            self.page_table[b, :shared] = self.page_table[0, :shared]
            self.page_table[b, reference.num_pages(length, s.page_size) :] = (-1, GARBAGE, len(pool))[b % 3]
            for tokens in (self.keys, self.values):
                tokens[b][: shared * s.page_size] = tokens[0][: shared * s.page_size]
        self.k_cache, self.v_cache = (
            torch.full((len(pool), s.kv_heads, s.page_size, s.head_dim), math.nan, dtype=s.dtype) for _ in range(2)
        )
        for b in range(batch):
            page, slot = self.slots(b, range(s.lengths[b]))
            self.k_cache[page, :, slot] = self.keys[b]
            self.v_cache[page, :, slot] = self.values[b]
        self.k_bounds, self.k_scales = new_bounds((len(pool), s.kv_heads), s.head_dim, s.kind.bounds, s.dtype, "cpu")
        self.k_bounds.fill_(UNREAD_BYTE if s.kind.scaled else math.nan)
        self.renew_bounds()

    def renew_bounds(self) -> None:
        """The reference's bounds of the keys in the cache."""
        where = (self.page_table, self.seq_lens, None, self.shape.kind.std_factor)
        if self.k_scales is None:
            self.k_bounds = reference.update_bounds(self.k_cache, self.k_bounds, *where)
        else:
            self.k_scales.fill_(math.nan)
            bounds = self.k_bounds, self.k_scales
            self.k_bounds, self.k_scales = reference.update_scaled_bounds(self.k_cache, *bounds, *where)

    @property
    def scoring(self) -> tuple[Tensor, ...]:
        """The first arguments of estimate."""
        return self.q, self.k_bounds, self.page_table, self.seq_lens

    @property
    def attention(self) -> tuple[Tensor, ...]:
        """The first arguments of sparse_decode."""
        return self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random).to(self.shape.dtype)

    def slots(self, b: int, tokens: range) -> tuple[Tensor, Tensor]:
        """Physical page and place in it of tokens of sequence b."""
        position = torch.tensor(tokens, dtype=torch.long)
        return self.page_table[b, position // self.shape.page_size].long(), position % self.shape.page_size

    def random_pages(self, k: int, per_head: bool = False, shuffled: bool = False) -> Tensor:
        """Random padded page lists of any source; shuffled ones have no order, and padding in between."""
        s = self.shape
        rows = (*self.q.shape[:-2], s.heads if per_head else s.kv_heads)
        lists = torch.full((*rows, k), -1, dtype=torch.int32)
        for row in lists.view(-1, k):
            chosen = torch.randperm(s.capacity, generator=self.random)[:k].int()
            chosen = chosen[: int(torch.randint(len(chosen) + 1, (), generator=self.random))]
            row[: len(chosen)] = chosen if shuffled else chosen.sort().values
            if shuffled:
                row.copy_(row[torch.randperm(k, generator=self.random)])
        return lists

    def poisoned(self, pages: Tensor) -> Case:
        """The same case with NaN in the keys and values of every page that no list of its head holds."""
        s = self.shape
        unread = torch.ones(self.k_cache.shape[:2], dtype=torch.bool)
        for b, lists in enumerate(pages):
            for h, chosen in enumerate(lists.view(-1, *pages.shape[-2:]).transpose(0, 1)):
                used = chosen[(chosen >= 0) & (chosen < reference.num_pages(s.lengths[b], s.page_size))]
                unread[self.page_table[b, used.long()].long(), h * s.kv_heads // pages.shape[-2]] = False
        unread = unread[..., None, None]
        return self.having(
            k_cache=self.k_cache.masked_fill(unread, math.nan), v_cache=self.v_cache.masked_fill(unread, math.nan)
        )

    def on(self, device: str) -> Case:
        """The operators' arguments for this case: placed in memory as the shape says."""
        names = ("q", "k_cache", "v_cache", "k_bounds")
        return self.having(
            **{
                name: place(getattr(self, name), LAYOUTS[layout], device)
                for name, layout in zip(names, self.shape.layouts, strict=True)
            },
            k_scales=None if self.k_scales is None else place(self.k_scales, LAYOUTS[self.shape.layouts[3]], device),
            page_table=place(self.page_table, "sliced", device),
            seq_lens=place(self.seq_lens, "unaligned", device),
        )

    def having(self, **tensors: Tensor | None) -> Case:
        """The same case with other tensors in these places."""
        other = copy.copy(self)
        other.__dict__.update(tensors)
        return other


@st.composite
def shapes(draw: st.DrawFn, max_new_tokens: int = 8, max_shared_pages: int = 2, any_kind: bool = False) -> Shape:
    """Shapes over the whole domain, with lengths around multiples of the page size and affordable sizes."""
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    page_size = draw(st.sampled_from(PAGE_SIZES))
    group = draw(st.integers(1, 16) | st.sampled_from((20, 32)))
    kv_heads = draw(st.integers(1, min(4, max(1, 32 // group))))
    batch = draw(st.integers(1, min(4, max(1, 64 // (group * kv_heads)))))
    most_tokens = min(draw(st.sampled_from((60, 200, 700))), 2**18 // (batch * kv_heads * head_dim))
    length = st.builds(
        lambda pages, off: max(0, pages * page_size + off),
        st.integers(0, max(1, most_tokens // page_size)),
        st.sampled_from((0, -1, 1, page_size // 2)),
    )
    return Shape(
        dtype=draw(st.sampled_from(DTYPES)),
        head_dim=head_dim,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        new_tokens=draw(st.integers(0, min(max_new_tokens, max(2, 96 // (batch * group * kv_heads))))),
        lengths=tuple(draw(st.lists(length, min_size=batch, max_size=batch))),
        spare_pages=draw(st.integers(1, 3)),
        shared_pages=draw(st.integers(0, max_shared_pages)),
        layouts=draw(st.tuples(*[st.integers(0, len(LAYOUTS) - 1)] * 4)),
        kind=draw(st.sampled_from(list(KINDS.values()))) if any_kind else Kind(),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def place(tensor: Tensor, layout: str, device: str) -> Tensor:
    """A copy with the strides of the layout, in the middle of NaN or invalid page numbers.

    All of that memory is the result's ``_base``. Comparing it shows writes beside the tensor too.
    """
    order = list(range(tensor.dim()))
    if layout == "transposed" and tensor.dim() > 2:
        order[-3], order[-2] = order[-2], order[-3]
    pad = {"sliced": 8, "unaligned": 1}.get(layout, 0)
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(1, tensor.shape[dim]) + pad
    offset = GUARD + pad % 8
    fill = math.nan if tensor.is_floating_point() else min(GARBAGE, torch.iinfo(tensor.dtype).max)
    memory = torch.full((offset + step + GUARD,), fill, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, strides, offset).copy_(tensor)


def place_far_apart(tensor: Tensor, device: str) -> Tensor:
    """A copy whose last page lies more than 2^31 elements after the first. The memory between is never touched."""
    stride = (2**31 // (tensor.shape[0] - 1) // 64 + 1) * 64  # keeps the alignment, and with it the kernel
    memory = torch.empty(stride * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride())).copy_(tensor)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, -0.0 and 0.0 being different; any NaN equals any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        actual, expected = (torch.where(x.isnan(), math.nan, x).contiguous().view(bits) for x in (actual, expected))
    torch.testing.assert_close(actual, expected.to(actual.device), rtol=0, atol=0)


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """Equal by value, NaN where NaN is expected."""
    torch.testing.assert_close(actual, expected.to(actual.device), rtol=0, atol=0, equal_nan=True)


def assert_accurate(actual: Tensor, exact: Tensor, naive: Tensor, dtype: torch.dtype) -> None:
    """The error is at most twice PyTorch's in the same dtype, plus the rounding of the result.

    NaN and infinities must be equal. Then the largest error is compared, and then the cosine difference of the whole,
    whose square root is the relative error.

    Args:
        actual: the operator's result.
        exact: the float64 reference.
        naive: the straightforward computation in ``dtype``, or several of them, stacked.
        dtype: of the inputs.
    """
    last_place = torch.finfo(actual.dtype).eps
    actual = actual.cpu().double()
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    assert_exact(actual.masked_fill(finite, 0), exact.masked_fill(finite, 0))
    if not finite.any():
        return
    actual, exact, naive = actual[finite], exact[finite], naive.double().view(-1, *exact.shape)[:, finite]
    assert actual.isfinite().all()
    assert naive.isfinite().all()
    rounded = exact.to(dtype)
    rounding = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    # Adding and subtracting 0.3 often rounds nothing where all results have one magnitude, as lse has.
    rounding = max(rounding, last_place * exact.abs().max().item())
    error, allowed = (actual - exact).abs().max().item(), 2 * (naive - exact).abs().max().item() + rounding
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"
    difference = cosine_difference(actual, exact)
    allowed = 4 * max(cosine_difference(run, exact) for run in naive) + last_place**2
    assert difference <= allowed, f"cosine difference {difference:.3g}, allowed {allowed:.3g}"


def cosine_difference(x: Tensor, y: Tensor) -> float:
    """1 - 2 x.y / (x.x + y.y), without the cancellation."""
    norm = (x.square() + y.square()).sum().item()
    return (x - y).square().sum().item() / norm if norm else 0.0
