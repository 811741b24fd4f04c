"""PagedKVCache: keys, values and page bounds of all layers in one pool of pages, with a page table and lengths.

The device holds what the kernels read and is only ever written in place, so addresses stay as they are: a CUDA graph or
a compiled function may be replayed while the cache grows. The host keeps an account of its own, so that
nothing on the way of a decode step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .bounds import BoundsKind, new_bounds
from .ops import DTYPES, HEAD_DIMS, PAGE_SIZES, append_kv, check_choice, update_bounds
from .page_allocator import NewPage, PageAllocator
from .report import AttentionCounts


class LayerCache(NamedTuple):
    """A layer of a cache: k_cache, v_cache [N, Hkv, S, D], k_bounds [N, Hkv, 2, D], k_scales [N, Hkv] or None."""

    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor
    k_scales: Tensor | None


class PagedKVCache:
    """A paged KV cache for a model's attention layers. One page table serves all layers.

    Each step: ``advance(T)`` once, then ``append`` (or :func:`quest_ops.quest_attention`) once in each layer. With
    torch.compile and CUDA graphs call ``advance`` before the compiled or captured part, as in eager mode. It may be
    inside as well: then the host's account is left alone, so ``reserve`` pages for all the steps beforehand and call
    ``sync_lengths`` after them.

    Args:
        num_layers, num_kv_heads, head_dim: L, Hkv, D of the model; D is 64, 80, 96, 128, 192 or 256.
        max_tokens: the longest a sequence may become.
        batch_size: B, sequences held side by side.
        page_size: S, tokens a page: 8, 16, 32, 64 or 128.
        num_pages: N, pages in the pool of each layer; enough for B sequences of ``max_tokens`` by default.
        dtype: float32, float16 or bfloat16.
        bounds: "int8" for page bounds in bytes, with a scale a page and head, or "cache" for bounds in that dtype.
        device: where everything lives.

    Attributes:
        k_cache, v_cache: [L, N, Hkv, S, D].
        k_bounds: [L, N, Hkv, 2, D], lower and upper bound of each page's keys.
        k_scales: [L, N, Hkv] float32, what int8 bounds are multiples of; None with bounds of the cache's dtype.
        page_table: [B, P] int32, physical pages, -1 where there is none; P = ceil(max_tokens / S).
        seq_lens: [B] int32, tokens in the cache, those of the current step included.
        start_lens: [B] int32, tokens before the current step.
        new_lens: [B] int32, the current step's tokens.
        ragged: whether the current step was given lengths of its own for each sequence.
        starts_empty: whether the current step found every sequence empty, as far as the host knows.

    Raises:
        ValueError: an argument out of its range.
    """

    #: What the attention calls read, counted from ``start_report`` on.
    counts: AttentionCounts | None = None

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_tokens: int,
        batch_size: int = 1,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        bounds: BoundsKind = "int8",
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, allowed in (
            ("head_dim", head_dim, HEAD_DIMS),
            ("page_size", page_size, PAGE_SIZES),
            ("dtype", dtype, DTYPES),
            ("bounds", bounds, get_args(BoundsKind)),
        ):
            check_choice(name, value, allowed)
        self.pages_per_sequence = -(-max_tokens // page_size)
        self.num_pages = batch_size * self.pages_per_sequence if num_pages is None else num_pages
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("max_tokens", max_tokens),
            ("batch_size", batch_size),
            ("num_pages", self.num_pages),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.max_tokens, self.batch_size, self.page_size = max_tokens, batch_size, page_size
        self.bounds: BoundsKind = bounds

        # Nothing is read before it is written, so the pool may start as whatever was in memory.
        pool = (num_layers, self.num_pages, num_kv_heads)
        self.k_cache = torch.empty((*pool, page_size, head_dim), dtype=dtype, device=device)
        self.v_cache = torch.empty_like(self.k_cache)
        self.k_bounds, self.k_scales = new_bounds(pool, head_dim, bounds, dtype, device)
        self.device = self.k_cache.device
        table = (batch_size, self.pages_per_sequence)
        self.page_table = torch.full(table, -1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.start_lens = torch.zeros_like(self.seq_lens)
        self.new_lens = torch.zeros_like(self.seq_lens)
        self._mark_static()

        self._account = PageAllocator(batch_size, self.num_pages, page_size, max_tokens)
        self._stale = False  # an advance in a compiled or captured region moved the lengths unseen
        self._step, self._step_of_layer, self._step_open, self._num_new = 0, [0] * num_layers, False, 0
        self.ragged = self.starts_empty = False

    def _mark_static(self) -> None:
        import torch._dynamo  # slow to import

        for pool in self.pools:
            # Were N symbolic, a layer's offset in the pool would be: Inductor (torch 2.13) takes the symbolic offset of
            # a view that an operator writes to for 0, and the tokens of all layers would go to the first.
            torch._dynamo.mark_static(pool)
        if self.device.type == "cuda":
            # So that compiled CUDA graphs need not copy the cache.
            for tensor in (*self.pools, self.page_table, self.seq_lens, self.start_lens, self.new_lens):
                torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def pools(self) -> list[Tensor]:
        """All tensors [L, N, ...] that hold something of each page."""
        return [x for x in (self.k_cache, self.v_cache, self.k_bounds, self.k_scales) if x is not None]

    # Lengths

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence as the host knows them.

        Exact, or an upper bound after ``advance`` with lengths in a device tensor, until ``sync_lengths``.
        """
        self._require_known_lengths()
        return list(self._account.high)

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence owns."""
        return len(self._account.free)

    @property
    def pages_in_use(self) -> int:
        """Logical pages that hold all tokens of the longest sequence: no device read, so perhaps more than it has."""
        if self._tracing() or self._stale:
            return self.pages_per_sequence
        return max(1, self._account.page_count(max(self._account.high)))

    def sync_lengths(self) -> list[int]:
        """Read the lengths from the device (this waits for it) and return them: after replays, or ragged steps.

        Raises:
            RuntimeError: the device advanced past the reserved pages, so tokens were lost. The host's account stays.
        """
        lengths: list[int] = self.seq_lens.tolist()
        for b, length in enumerate(lengths):
            reserved = self._account.reserved_tokens(b)
            if length > reserved:
                raise RuntimeError(
                    f"seq_lens must stay within the reserved pages, {reserved} tokens for sequence {b}, got {length}: "
                    f"reserve pages for all steps before replaying them"
                )
        self._account.low, self._account.high, self._stale = list(lengths), list(lengths), False
        return lengths

    # A step

    def reserve(self, tokens: int, sequence: int | None = None) -> None:
        """Make sure that ``tokens`` more tokens have pages of their own, in one sequence or in each.

        ``advance`` does it by itself; call it ahead of steps whose ``advance`` is compiled or captured. Pages that are
        shared with a fork and would be written are copied. The device is written to only where a page is new.

        Raises:
            CacheFullError: out of pages, or ``max_tokens`` exceeded; nothing was changed.
            RuntimeError: lengths moved on the device and ``sync_lengths`` was not called.
        """
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._require_known_lengths()
        rows = range(self.batch_size) if sequence is None else (self._row(sequence, "sequence"),)
        self._assign(self._account.reserve([tokens if b in rows else 0 for b in range(self.batch_size)]))

    def advance(self, num_new: int, new_lens: Tensor | Sequence[int] | None = None) -> None:
        """Begin a step of ``num_new`` tokens in each sequence: reserve their pages and move the lengths.

        Args:
            num_new: T, at least 1: the T of the k and v that follow.
            new_lens: how many of them are real in each sequence, the first of its row (ragged prefill; 0 leaves a
                sequence as it is). Host numbers, or int32 [B] on the device: these are not read but clamped to 0..T,
                and the host counts T for each until ``sync_lengths``.

        Raises:
            CacheFullError, RuntimeError: as ``reserve``.
            ValueError: an argument out of its range.
        """
        if self._tracing():
            if new_lens is not None and not isinstance(new_lens, Tensor):
                raise TypeError(f"new_lens must be an int32 tensor in a compiled step, got {type(new_lens).__name__}")
            self._stale, self.starts_empty = True, False
            on_device = new_lens
        else:
            on_device = self._advance_host(num_new, new_lens)
        self.ragged = on_device is not None
        self.start_lens.copy_(self.seq_lens)
        if on_device is None:
            self.new_lens.fill_(num_new)
        else:
            self.new_lens.copy_(on_device.clamp(0, num_new), non_blocking=True)
        self.seq_lens.add_(self.new_lens)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the step's keys and values of one layer, [B, T, Hkv, D], and renew the bounds of the pages touched.

        Raises:
            RuntimeError: ``advance`` was not called since this layer's last append (unseen in compiled and captured
                code), or T is not that of ``advance``; or as :func:`quest_ops.append_kv`.
        """
        self.claim_step(layer, k)
        k_cache, v_cache, k_bounds, k_scales = self.layer(layer)
        new_lens = self.new_lens if self.ragged else None
        append_kv(k, v, k_cache, v_cache, k_bounds, self.page_table, self.start_lens, new_lens, k_scales)

    def claim_step(self, layer: int, k: Tensor) -> None:
        """Note that a layer's keys of the step are about to be written, by ``append`` or otherwise; raises as it."""
        if self._tracing() or self._stale:
            return
        self.layer(layer)
        if not self._step_open or self._step_of_layer[layer] == self._step:
            raise RuntimeError(f"layer {layer} has no open step: call cache.advance(T) once a step, before the layers")
        if k.dim() == 4 and k.shape[1] != self._num_new:
            raise RuntimeError(f"k must have the T of cache.advance, {self._num_new}, in dimension 1, got {k.shape[1]}")
        self._step_of_layer[layer] = self._step

    def layer(self, index: int) -> LayerCache:
        """The tensors of one layer: views of the pools, [N, ...]."""
        if not 0 <= index < self.num_layers:
            raise ValueError(f"layer must be 0 to {self.num_layers - 1}, got {index}")
        k_scales = None if self.k_scales is None else self.k_scales[index]
        return LayerCache(self.k_cache[index], self.v_cache[index], self.k_bounds[index], k_scales)

    def start_report(self) -> None:
        """Count from now on what attention reads in each layer; before compiling or capturing. See :mod:`.report`."""
        heads = (self.num_layers, self.num_kv_heads, self.head_dim, self.page_size)
        self.counts = AttentionCounts(*heads, self.k_cache.dtype, self.device, self.bounds)

    def stop_report(self) -> None:
        """Count no more."""
        self.counts = None

    # Sequences

    def crop(self, tokens: int, sequence: int | None = None) -> None:
        """Keep the first ``tokens`` tokens of one sequence, or of each, and give back the pages past them.

        Sequences that are no longer than that stay as they are. The bounds of a last page that is cut are recomputed in
        all layers; where a fork shares the page they cover its tokens too, until the next append makes them exact.
        """
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._require_known_lengths()
        rows = range(self.batch_size) if sequence is None else (self._row(sequence, "sequence"),)
        keep, cut = self._account.page_count(tokens), []
        for b in rows:
            if not self._account.crop(b, tokens):
                continue
            self.page_table[b, keep:].fill_(-1)
            self.seq_lens[b].clamp_(max=tokens)
            self.start_lens[b].clamp_(max=tokens)
            if tokens % self.page_size and not self._account.shared(b, keep - 1):
                cut.append(b)
        self._step_open = False
        if cut:
            self._renew_last_page(cut, keep - 1)

    def fork(self, source: int, target: int) -> None:
        """Make sequence ``target`` a copy of ``source``. What it held is freed; pages are shared until one is written.

        Pages that ``source`` has reserved ahead stay its own. Reserve again before steps that are replayed, so that the
        page both would write is copied. Needs no page and moves no keys.
        """
        source, target = self._row(source, "source"), self._row(target, "target")
        if source == target:
            raise ValueError(f"target must be another sequence than source, got {target} for both")
        self._require_known_lengths()
        count = self._account.fork(source, target)
        self.page_table[target].fill_(-1)
        self.page_table[target, :count].copy_(self.page_table[source, :count])
        self.seq_lens[target].copy_(self.seq_lens[source])
        self.start_lens[target].copy_(self.start_lens[source])
        self._step_open = False

    def free(self, sequence: int) -> None:
        """Empty one sequence and give its pages back."""
        b = self._row(sequence, "sequence")
        self._account.release(b)
        for tensor in (self.seq_lens, self.start_lens, self.new_lens):
            tensor[b].zero_()
        self.page_table[b].fill_(-1)
        self._step_open = False

    def reset(self) -> None:
        """Empty every sequence. Memory and addresses stay."""
        for b in range(self.batch_size):
            self.free(b)
        self._stale = False

    # The host's account

    def _tracing(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        return self.k_cache.is_cuda and torch.cuda.is_current_stream_capturing()

    def _row(self, sequence: int, name: str) -> int:
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"{name} must be 0 to {self.batch_size - 1}, got {sequence}")
        return sequence

    def _require_known_lengths(self) -> None:
        if self._stale:
            raise RuntimeError(
                "the lengths moved on the device, in a compiled or captured advance: call sync_lengths() first"
            )

    def _advance_host(self, num_new: int, new_lens: Tensor | Sequence[int] | None) -> Tensor | None:
        """The host's part of ``advance``; returns new_lens on the device."""
        if num_new < 1:
            raise ValueError(f"num_new must be at least 1, got {num_new}")
        self._require_known_lengths()
        B, on_device = self.batch_size, None
        low = high = [num_new] * B
        if isinstance(new_lens, Tensor):
            if new_lens.shape != (B,) or new_lens.dtype != torch.int32:
                raise ValueError(f"new_lens must be int32 [{B}], got {new_lens.dtype} {list(new_lens.shape)}")
            if new_lens.device.type == "cpu":
                new_lens = new_lens.tolist()
            elif new_lens.device != self.device:
                raise ValueError(f"new_lens must be on {self.device} like the cache, got {new_lens.device}")
            else:
                low, on_device = [0] * B, new_lens
        if new_lens is not None and on_device is None:
            low = high = list(new_lens)
            if len(high) != B or not all(0 <= n <= num_new for n in high):
                raise ValueError(f"new_lens must hold {B} numbers from 0 to num_new, {num_new}, got {high}")
            on_device = torch.tensor(high, dtype=torch.int32)
        starts_empty = not any(self._account.high)
        self._assign(self._account.reserve(high))
        self._account.grow(low, high)
        self.starts_empty = starts_empty
        self._step, self._step_open, self._num_new = self._step + 1, True, num_new
        return on_device

    def _assign(self, new: list[NewPage]) -> None:
        """Copy the shared pages that were replaced, then name the new pages in the page table."""
        if not new:
            return
        copies = [(n.copy_of, n.page) for n in new if n.copy_of is not None]
        if copies:
            source, destination = self._to_device(copies).T
            for pool in self.pools:
                pool.index_copy_(1, destination, pool.index_select(1, source))
        entries = [(n.sequence * self.pages_per_sequence + n.logical, n.page) for n in new]
        position, value = self._to_device(entries).T
        self.page_table.view(-1).index_copy_(0, position, value.int())

    def _to_device(self, pairs: list[tuple[int, int]]) -> Tensor:
        # Made on the host and sent without waiting: torch.tensor(device="cuda") would synchronise.
        return torch.tensor(pairs, dtype=torch.int64).to(self.device, non_blocking=True)

    def _renew_last_page(self, rows: list[int], logical: int) -> None:
        """Bounds of one logical page of some rows in all layers, by one launch that takes each page for a sequence."""
        L, N, start = self.num_layers, self.num_pages, logical * self.page_size
        entries = [(layer * N + self._account.tables[b][logical], b) for layer in range(L) for b in rows]
        page, row = self._to_device(entries).T
        tokens = (self.seq_lens[row] - start).clamp_(min=0)
        k_cache, k_bounds = self.k_cache.flatten(0, 1), self.k_bounds.flatten(0, 1)
        k_scales = None if self.k_scales is None else self.k_scales.flatten(0, 1)
        update_bounds(k_cache, k_bounds, page[:, None].int(), tokens, k_scales=k_scales)
