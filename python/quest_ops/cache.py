"""PagedKVCache: a KVState with the host's account of its pages and lengths.

The host assigns pages from an account of its own, so that no decode step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .bounds import BoundsKind
from .kv_state import KVState, StepCache
from .ops import DTYPES, HEAD_DIMS, PAGE_SIZES, check_choice
from .page_allocator import NewPage, PageAllocator


class PagedKVCache(StepCache):
    """A paged KV cache for a model's attention layers. One page table serves all layers.

    Each step calls ``advance(T)`` once, then ``append`` (or :func:`quest_ops.quest_attention`) once in each layer. With
    torch.compile and CUDA graphs, ``advance`` comes before the compiled or captured code, as in eager mode. It may also
    be inside. The host's account then stays as it is: call ``reserve`` for all the steps beforehand, and
    ``sync_lengths`` after them.

    Args:
        num_layers, num_kv_heads, head_dim: L, Hkv, D of the model; D one of :data:`quest_ops.ops.HEAD_DIMS`.
        max_tokens: the longest that a sequence may become.
        batch_size: B, sequences held side by side.
        page_size: S, tokens a page, one of :data:`quest_ops.ops.PAGE_SIZES`.
        num_pages: N, pages in the pool of each layer; by default enough for B sequences of ``max_tokens``.
        dtype: float32, float16 or bfloat16.
        bounds: "int8" for page bounds in bytes with a scale a page and head, "cache" for bounds in ``dtype``.
        device: of all tensors.

    Attributes:
        k_cache, v_cache: [L, N, Hkv, S, D].
        k_bounds: [L, N, Hkv, 2, D], lower and upper bound of each page's keys.
        k_scales: [L, N, Hkv] float32, the scales of int8 bounds; None with bounds of the cache's dtype.
        page_table: [B, P] int32, physical pages, -1 where there is none; P = ceil(max_tokens / S).
        seq_lens: [B] int32, tokens in the cache, those of the current step included.
        start_lens: [B] int32, tokens before the current step.
        new_lens: [B] int32, the current step's tokens.
        ragged: whether the current step was given a length for each sequence.
        starts_empty: whether the host knows that every sequence was empty before the current step.

    Raises:
        ValueError: an argument out of its range.
    """

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
        for choice, value, allowed in (
            ("head_dim", head_dim, HEAD_DIMS),
            ("page_size", page_size, PAGE_SIZES),
            ("dtype", dtype, DTYPES),
            ("bounds", bounds, get_args(BoundsKind)),
        ):
            check_choice(choice, value, allowed)
        pages_per_sequence = -(-max_tokens // page_size)
        num_pages = batch_size * pages_per_sequence if num_pages is None else num_pages
        for name, number in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("max_tokens", max_tokens),
            ("batch_size", batch_size),
            ("num_pages", num_pages),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        page_table = torch.full((batch_size, pages_per_sequence), -1, dtype=torch.int32, device=device)
        seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        pool = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        super().__init__(KVState.allocate(pool, page_table, seq_lens, dtype=dtype, bounds=bounds), max_tokens)
        self._mark_static()

        self._allocator = PageAllocator(batch_size, num_pages, page_size, max_tokens)
        self._stale = False  # an advance in compiled or captured code moved the lengths unseen by the host
        self._step, self._step_of_layer, self._step_open, self._num_new = 0, [0] * num_layers, False, 0

    def _mark_static(self) -> None:
        import torch._dynamo  # slow to import

        for pool in self.pools:
            # A symbolic N would make a layer's offset in the pool symbolic. Inductor (torch 2.13) takes the symbolic
            # offset of a view that an operator writes to for 0: the tokens of all layers would go to the first.
            torch._dynamo.mark_static(pool)
        if self.device.type == "cuda":
            # Compiled CUDA graphs then need no copy of the cache.
            for tensor in (*self.pools, self.page_table, self.seq_lens, self.start_lens, self.new_lens):
                torch._dynamo.mark_static_address(tensor, guard=False)

    # Lengths

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence by the host's account.

        After ``advance`` with lengths in a device tensor they are upper bounds, until ``sync_lengths``.
        """
        self._require_known_lengths()
        return list(self._allocator.high)

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no sequence owns."""
        return len(self._allocator.free)

    @property
    def pages_in_use(self) -> int:
        """Logical pages that hold all tokens of the longest sequence.

        The device is not read, so the number may be larger than needed.
        """
        if self._host_is_blind() or self._stale:
            return self.pages_per_sequence
        return max(1, self._allocator.page_count(max(self._allocator.high)))

    def sync_lengths(self) -> list[int]:
        """Read the lengths from the device and return them. Call it after replays, or ragged steps. It synchronises.

        Raises:
            RuntimeError: the device advanced past the reserved pages, so tokens were lost. The host's account stays.
        """
        lengths: list[int] = self.seq_lens.tolist()
        for b, length in enumerate(lengths):
            reserved = self._allocator.reserved_tokens(b)
            if length > reserved:
                raise RuntimeError(
                    f"seq_lens must stay within the reserved pages, {reserved} tokens for sequence {b}, got {length}: "
                    f"reserve pages for all steps before replaying them"
                )
        self._allocator.low, self._allocator.high, self._stale = list(lengths), list(lengths), False
        return lengths

    # A step

    def reserve(self, tokens: int, sequence: int | None = None) -> None:
        """Give ``tokens`` more tokens pages of their own, in one sequence or in each.

        ``advance`` reserves by itself. Call this ahead of steps whose ``advance`` is compiled or captured. Pages that a
        fork shares and that would be written are copied. The device is written to only where a page is new.

        Raises:
            CacheFullError: out of pages, or ``max_tokens`` exceeded; nothing was changed.
            RuntimeError: lengths moved on the device and ``sync_lengths`` was not called.
            ValueError: an argument out of its range.
        """
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._require_known_lengths()
        rows = range(self.batch_size) if sequence is None else (self._row(sequence, "sequence"),)
        self._assign(self._allocator.reserve([tokens if b in rows else 0 for b in range(self.batch_size)]))

    def advance(self, num_new: int, new_lens: Tensor | Sequence[int] | None = None) -> None:
        """Begin a step of ``num_new`` tokens in each sequence: reserve their pages and move the lengths.

        Args:
            num_new: T, at least 1: the T of the k and v that follow.
            new_lens: for ragged steps, the real tokens of each sequence, the first of its row; 0 leaves a sequence as
                it is. Either host numbers, or int32 [B] on the device. The host does not read the latter: they are
                clamped to 0..T, and the host counts T for each until ``sync_lengths``.

        Raises:
            CacheFullError, RuntimeError: as ``reserve``.
            ValueError: an argument out of its range.
        """
        if self._host_is_blind():
            super().advance(num_new, new_lens)
            self._stale, self.starts_empty = True, False
        else:
            super().advance(num_new, self._advance_host(num_new, new_lens))

    def claim_step(self, layer: int, k: Tensor) -> None:
        """Note that a layer is about to write its keys ``k`` of the step, by ``append`` or otherwise.

        Raises:
            RuntimeError: ``advance`` was not called since this layer last wrote, or T is not that of ``advance``.
                Compiled and captured code is not checked.
            ValueError: no such layer.
        """
        super().claim_step(layer, k)
        if self._host_is_blind() or self._stale:
            return
        if not self._step_open or self._step_of_layer[layer] == self._step:
            raise RuntimeError(f"layer {layer} has no open step: call cache.advance(T) once a step, before the layers")
        if k.dim() == 4 and k.shape[1] != self._num_new:
            raise RuntimeError(f"k must have the T of cache.advance, {self._num_new}, in dimension 1, got {k.shape[1]}")
        self._step_of_layer[layer] = self._step

    # Sequences

    def crop(self, tokens: int, sequence: int | None = None) -> None:
        """Keep the first ``tokens`` tokens of one sequence, or of each, and give back the pages past them.

        Shorter sequences stay as they are. The bounds of a cut last page are recomputed in all layers. Where a fork
        shares that page, its bounds cover the fork's tokens too, until the next append makes them exact.

        Raises:
            RuntimeError: lengths moved on the device and ``sync_lengths`` was not called.
            ValueError: an argument out of its range.
        """
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._require_known_lengths()
        rows = range(self.batch_size) if sequence is None else (self._row(sequence, "sequence"),)
        keep, cut = self._allocator.page_count(tokens), []
        for b in rows:
            if not self._allocator.crop(b, tokens):
                continue
            self.page_table[b, keep:].fill_(-1)
            self.seq_lens[b].clamp_(max=tokens)
            self.start_lens[b].clamp_(max=tokens)
            if tokens % self.page_size and not self._allocator.shared(b, keep - 1):
                cut.append(b)
        self._step_open = False
        if cut:
            owners = [(b, self._allocator.tables[b][keep - 1]) for b in cut]
            self.state.update_bounds_of_page(keep - 1, owners)

    def fork(self, source: int, target: int) -> None:
        """Make sequence ``target`` a copy of ``source``, after freeing its old tokens. Pages are shared until written.

        This needs no page and moves no keys. Pages that ``source`` has reserved ahead stay its own. Reserve again
        before replayed steps, so that the page that both would write is copied.

        Raises:
            RuntimeError: lengths moved on the device and ``sync_lengths`` was not called.
            ValueError: a sequence out of range, or the same for both.
        """
        source, target = self._row(source, "source"), self._row(target, "target")
        if source == target:
            raise ValueError(f"target must be another sequence than source, got {target} for both")
        self._require_known_lengths()
        count = self._allocator.fork(source, target)
        self.page_table[target].fill_(-1)
        self.page_table[target, :count].copy_(self.page_table[source, :count])
        self.seq_lens[target].copy_(self.seq_lens[source])
        self.start_lens[target].copy_(self.start_lens[source])
        self._step_open = False

    def free(self, sequence: int) -> None:
        """Empty one sequence and give its pages back."""
        b = self._row(sequence, "sequence")
        self._allocator.release(b)
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

    def _host_is_blind(self) -> bool:
        """Whether this call is traced or captured, so that the host will not see it again when it runs."""
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
        """The host's side of ``advance``. Returns new_lens as a tensor, or None."""
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
        starts_empty = not any(self._allocator.high)
        self._assign(self._allocator.reserve(high))
        self._allocator.grow(low, high)
        self.starts_empty = starts_empty
        self._step, self._step_open, self._num_new = self._step + 1, True, num_new
        return on_device

    def _assign(self, new: list[NewPage]) -> None:
        """Copy the shared pages that are replaced, then write the new pages into the page table."""
        if not new:
            return
        copies = [(page.copy_of, page.page) for page in new if page.copy_of is not None]
        if copies:
            self.state.copy_pages(copies)
        self.state.set_pages([(page.sequence, page.logical, page.page) for page in new])
