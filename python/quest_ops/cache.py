"""PagedKVCache: a KVState with the host's account of its pages and lengths.

The host assigns pages from an account of its own, so that no decode step waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import torch
from torch import Tensor

from .bounds import BoundsKind, check_std_factor
from .kv_state import KVState, StepCache, write_together
from .layer_steps import LayerSteps
from .ops import DTYPES, HEAD_DIMS, PAGE_SIZES, check_choice, check_whole
from .page_allocator import NewPage, PageAllocator


class PagedKVCache(StepCache):
    """A paged KV cache for a model's attention layers. One page table serves all layers.

    Each step calls ``advance(T)`` once, then ``append`` (or :func:`quest_ops.quest_attention`) once in each layer. With
    torch.compile and CUDA graphs, ``advance`` comes before the compiled or captured code, as in eager mode. It may also
    be inside. The host's account then stays as it is: call ``reserve`` for all the steps beforehand, and
    ``sync_lengths`` after them.

    A method that raises has changed nothing, so it can be called again. An interrupt may also come after all is done;
    ``lengths`` tells. A layer left out of a step raises at its next step, since it would read slots that were never
    written. After an exception between the layers of a step, ``crop`` to the lengths before it, or ``reset``.

    Args:
        num_layers, num_kv_heads, head_dim: L, Hkv, D of the model; D one of :data:`quest_ops.ops.HEAD_DIMS`.
        max_tokens: the longest that a sequence may become.
        batch_size: B, sequences held side by side.
        page_size: S, tokens a page, one of :data:`quest_ops.ops.PAGE_SIZES`.
        num_pages: N, pages in the pool of each layer; by default enough for B sequences of ``max_tokens``.
        dtype: float32, float16 or bfloat16.
        bounds: how page bounds are stored: "int8" or "int4" for 8 or 4 bits with a scale a page and head, "cache" for
            ``dtype``.
        std_factor: bounds are mean - std_factor * std and mean + std_factor * std of a page's keys; None: minimum and
            maximum, as in the paper.
        codes: keep each key in 2 bits a dimension, for ``QuestConfig.candidates``.
        kept_pages: pages of the lists that sequences keep, ``config.kept_pages`` for ``QuestConfig.reselect_every``.
        device: of all tensors.
        poison_freed: fill pages with NaN when they are made and when they are freed, so that any read of them shows.
            By default where ``QUEST_OPS_POISON=1`` is in the environment.

    Attributes:
        k_cache, v_cache: [L, N, Hkv, S, D].
        k_bounds: [L, N, Hkv, 2, D], lower and upper bound of each page's keys; [L, N, Hkv, 2, D / 2] with "int4".
        k_scales: [L, N, Hkv] float32, the scales of bounds of 8 or 4 bits; None with bounds of the cache's dtype.
        k_codes, code_scales: [L, N, Hkv, S, D / 4] uint8 and [L, N, Hkv, S] float32, the keys in 2 bits; None without
            ``codes``.
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
        bounds: BoundsKind = "int4",
        std_factor: float | None = 1.0,
        codes: bool = False,
        kept_pages: int = 0,
        device: torch.device | str = "cpu",
        poison_freed: bool | None = None,
    ) -> None:
        for choice, value, allowed in (
            ("head_dim", head_dim, HEAD_DIMS),
            ("page_size", page_size, PAGE_SIZES),
            ("dtype", dtype, DTYPES),
            ("bounds", bounds, get_args(BoundsKind)),
            ("codes", codes, (False, True)),
        ):
            check_choice(choice, value, allowed)
        check_std_factor(std_factor)
        for name, number in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("max_tokens", max_tokens),
            ("batch_size", batch_size),
            ("num_pages", 1 if num_pages is None else num_pages),
        ):
            check_whole(name, number)
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        check_whole("kept_pages", kept_pages)
        if kept_pages < 0:
            raise ValueError(f"kept_pages must be at least 0, got {kept_pages}")
        pages_per_sequence = -(-max_tokens // page_size)
        num_pages = batch_size * pages_per_sequence if num_pages is None else num_pages
        pool = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        with torch.inference_mode(False):  # normal tensors, since later steps may run outside inference mode
            page_table = torch.full((batch_size, pages_per_sequence), -1, dtype=torch.int32, device=device)
            seq_lens = torch.zeros(batch_size, dtype=torch.int32, device=device)
            state = KVState.allocate(
                pool,
                page_table,
                seq_lens,
                dtype=dtype,
                bounds=bounds,
                std_factor=std_factor,
                codes=codes,
                kept_pages=kept_pages,
            )
            super().__init__(state, max_tokens)
        self._mark_for_dynamo()

        self._allocator = PageAllocator(batch_size, num_pages, page_size, max_tokens)
        self._steps = LayerSteps(num_layers)
        self._stale = False  # an advance in compiled or captured code moved the lengths unseen by the host
        self._torn = False  # an interrupt stopped a change of the host's account
        self.poison_freed = os.environ.get("QUEST_OPS_POISON") == "1" if poison_freed is None else poison_freed
        self._to_poison = set(range(num_pages)) if self.poison_freed else set()
        self._poison()

    def _mark_for_dynamo(self) -> None:
        import torch._dynamo  # slow to import

        for pool in self.pools:
            # A symbolic N would make a layer's offset in the pool symbolic. Inductor (torch 2.13) takes the symbolic
            # offset of a view that an operator writes to for 0: the tokens of all layers would go to the first.
            torch._dynamo.mark_static(pool)
        kept = [] if self.state.kept is None else self.state.kept.tensors
        for tensor in (self.page_table, self.seq_lens, self.start_lens, self.new_lens, *kept):
            # The batch is symbolic where that of q is, as after mark_dynamic(q, 0), and constant elsewhere.
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self.device.type == "cuda":
            # Compiled CUDA graphs then need no copy of the cache.
            assert self.state.counters is not None
            lengths = (self.seq_lens, self.start_lens, self.new_lens)
            for tensor in (*self.pools, self.page_table, *lengths, self.state.counters, *kept):
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
        self._require_whole()
        lengths: list[int] = self.seq_lens.tolist()
        for b, length in enumerate(lengths):
            reserved = self._allocator.reserved_tokens(b)
            if length > reserved:
                raise RuntimeError(
                    f"seq_lens must stay within the reserved pages, {reserved} tokens for sequence {b}, got {length}: "
                    f"reserve pages for all steps before replaying them"
                )
        self._allocator.low, self._allocator.high, self._stale = list(lengths), list(lengths), False
        for b, length in enumerate(lengths):
            self._steps.keep(b, length)
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
        check_whole("tokens", tokens)
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._require_known_lengths()
        rows = range(self.batch_size) if sequence is None else (self._row(sequence, "sequence"),)
        counts = [tokens if b in rows else 0 for b in range(self.batch_size)]
        new = self._allocator.plan(counts)
        self._change(self._pages_written(new), lambda: self._allocator.take(counts, new))

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
            return
        low, high, on_device = self._counts(num_new, new_lens)
        new = self._allocator.plan(high)
        start = self.seq_lens.clone()
        lens = torch.full_like(start, num_new) if on_device is None else on_device.clamp(0, num_new)

        def account() -> None:
            self._steps.begin(num_new, self._allocator.low, high)
            self.starts_empty = not any(self._allocator.high)
            self.ragged = new_lens is not None
            self._allocator.take(high, new)
            self._allocator.grow(low, high)

        lengths = [(self.start_lens, start), (self.new_lens, lens), (self.seq_lens, start + lens)]
        steps = self._kept_steps(start + lens if num_new == 1 and new_lens is None else None)
        self._change([*self._pages_written(new), *lengths, *steps], account)

    def claim_step(self, layer: int, k: Tensor) -> None:
        """Check that a layer may write its keys ``k`` of the step. ``append`` does so, and calls ``step_written``.

        Raises:
            RuntimeError: ``advance`` was not called since this layer last wrote, T is not that of ``advance``, or the
                layer was left out of an earlier step. Compiled and captured code is not checked.
            ValueError: no such layer.
        """
        super().claim_step(layer, k)
        if self._host_is_blind() or self._stale:
            return
        if not self._steps.expects(layer):
            raise RuntimeError(f"layer {layer} has no open step: call cache.advance(T) once a step, before the layers")
        if k.dim() == 4 and k.shape[1] != self._steps.num_new:
            raise RuntimeError(
                f"k must have the T of cache.advance, {self._steps.num_new}, in dimension 1, got {k.shape[1]}"
            )
        if lacking := self._steps.first_lacking(layer):
            raise RuntimeError(
                f"layer {layer} has not written sequence {lacking[0]} from token {lacking[1]} on, since it was left "
                f"out of a step: crop the sequence to {lacking[1]} tokens, free it, or reset the cache"
            )

    def step_written(self, layer: int) -> None:
        """Note that a layer has written its keys and values of the step."""
        if self._host_is_blind():
            self._steps.unseen = True
        else:
            self._steps.wrote(layer)

    # Sequences

    def crop(self, tokens: int, sequence: int | None = None) -> None:
        """Keep the first ``tokens`` tokens of one sequence, or of each, and give back the pages past them.

        Shorter sequences stay as they are. The bounds of a cut last page are recomputed in all layers. Where a fork
        shares that page, its bounds cover the fork's tokens too, until the next append makes them exact.

        Raises:
            RuntimeError: lengths moved on the device and ``sync_lengths`` was not called.
            ValueError: an argument out of its range.
        """
        check_whole("tokens", tokens)
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        self._require_known_lengths()
        named = range(self.batch_size) if sequence is None else (self._row(sequence, "sequence"),)
        rows = [b for b in named if self._allocator.high[b] > tokens]
        keep, S = self._allocator.page_count(tokens), self.page_size
        writes: list[tuple[Tensor, Tensor]] = []
        if rows:
            limits = [tokens if b in rows else self.max_tokens for b in range(self.batch_size)]
            limit = torch.tensor(limits, dtype=torch.int32).to(self.device, non_blocking=True)
            seq_lens = self.seq_lens.minimum(limit)
            writes = [(self.seq_lens, seq_lens), (self.start_lens, self.start_lens.minimum(limit))]
            writes += self._kept_steps()
            if keep < self.pages_per_sequence:
                none = torch.full_like(self.page_table[0, keep:], -1)
                writes += [(self.page_table[b, keep:], none) for b in rows]
            if tokens % S:
                owners = [(b, self._allocator.tables[b][keep - 1]) for b in rows]
                owners = [owner for owner in owners if not self._allocator.shared(owner[0], keep - 1)]
                writes += self.state.bounds_of_page(keep - 1, owners, seq_lens) if owners else []

        def account() -> None:
            self._steps.end()
            for b in rows:
                self._allocator.crop(b, tokens)
                self._steps.keep(b, tokens)

        self._change(writes, account)

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
        count = self._allocator.page_count(self._allocator.high[source])
        row = torch.full_like(self.page_table[target], -1)
        row[:count] = self.page_table[source, :count]

        def account() -> None:
            self._steps.end()
            self._allocator.fork(source, target)
            self._steps.fork(source, target)

        lengths = [(lens[target], lens[source]) for lens in (self.seq_lens, self.start_lens)]
        self._change([(self.page_table[target], row), *lengths, *self._kept_steps()], account)

    def free(self, sequence: int) -> None:
        """Empty one sequence and give its pages back.

        Raises:
            ValueError: no such sequence.
        """
        b = self._row(sequence, "sequence")
        self._require_whole()

        def account() -> None:
            self._steps.end()
            self._allocator.release(b)
            self._steps.keep(b, 0)

        self._change(self._emptied(slice(b, b + 1)), account)

    def reset(self) -> None:
        """Empty every sequence. Memory and addresses stay."""

        def account() -> None:
            self._allocator = PageAllocator(self.batch_size, self.num_pages, self.page_size, self.max_tokens)
            steps = LayerSteps(self.num_layers)
            steps.unseen = self._steps.unseen
            self._steps, self._stale = steps, False

        self._change(self._emptied(slice(None)), account)

    # The host's account

    def _row(self, sequence: int, name: str) -> int:
        check_whole(name, sequence)
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"{name} must be 0 to {self.batch_size - 1}, got {sequence}")
        return sequence

    def _require_known_lengths(self) -> None:
        self._require_whole()
        if self._stale:
            raise RuntimeError(
                "the lengths moved on the device, in a compiled or captured advance: call sync_lengths() first"
            )

    def _require_whole(self) -> None:
        if self._torn:
            raise RuntimeError("an interrupt stopped a change of the cache's pages and lengths: call reset()")

    def _counts(
        self, num_new: int, new_lens: Tensor | Sequence[int] | None
    ) -> tuple[list[int], list[int], Tensor | None]:
        """The fewest and the most tokens that a step gives each sequence, and new_lens as a tensor on the device."""
        check_whole("num_new", num_new)
        if num_new < 1:
            raise ValueError(f"num_new must be at least 1, got {num_new}")
        self._require_known_lengths()
        B = self.batch_size
        if new_lens is None:
            return [num_new] * B, [num_new] * B, None
        if isinstance(new_lens, Tensor):
            if new_lens.shape != (B,) or new_lens.dtype != torch.int32:
                raise ValueError(f"new_lens must be int32 [{B}], got {new_lens.dtype} {list(new_lens.shape)}")
            if new_lens.device.type != "cpu":
                if new_lens.device != self.device:
                    raise ValueError(f"new_lens must be on {self.device} like the cache, got {new_lens.device}")
                return [0] * B, [num_new] * B, new_lens
            new_lens = new_lens.tolist()
        if not isinstance(new_lens, Iterable):
            raise ValueError(f"new_lens must hold {B} numbers from 0 to num_new, {num_new}, got {new_lens!r}")
        counts = list(new_lens)
        for count in counts:
            check_whole("each of new_lens", count)
        if len(counts) != B or not all(0 <= n <= num_new for n in counts):
            raise ValueError(f"new_lens must hold {B} numbers from 0 to num_new, {num_new}, got {counts}")
        return counts, counts, torch.tensor(counts, dtype=torch.int32).to(self.device, non_blocking=True)

    def _pages_written(self, new: list[NewPage]) -> list[tuple[Tensor, Tensor]]:
        """Copy shared pages into the free pages that replace them. Returns the write of the page table."""
        self._poison()
        copies = [(page.copy_of, page.page) for page in new if page.copy_of is not None]
        if copies:
            if self.poison_freed:  # should this fail, the copies lie in free pages
                self._to_poison.update(page for _, page in copies)
            self.state.copy_pages(copies)
        entries = [(page.sequence, page.logical, page.page) for page in new]
        return [(self.page_table, self.state.with_pages(entries))] if entries else []

    def _emptied(self, rows: slice) -> list[tuple[Tensor, Tensor]]:
        """The writes that empty sequences."""
        lengths = [lens[rows] for lens in (self.seq_lens, self.start_lens, self.new_lens)]
        table = self.page_table[rows]
        emptied = [(lens, torch.zeros_like(lens)) for lens in lengths]
        return [(table, torch.full_like(table, -1)), *emptied, *self._kept_steps()]

    def _change(self, writes: list[tuple[Tensor, Tensor]], account: Callable[[], None]) -> None:
        """Change the device's tensors and the host's account: both or none.

        Args:
            writes: as in :func:`write_together`.
            account: changes the host's account, in plain Python.
        """
        owned = self._owned() if self.poison_freed else set()
        self._torn = True  # until both agree, or an interrupt between them would go unnoticed
        try:
            write_together(writes)
        except BaseException:
            # An interrupt shows only after the operation, so the account follows if the device has its new values.
            # Lengths and page tables tell: bounds change only with them, and may hold NaN, which equals nothing.
            numbers = [(tensor, values) for tensor, values in writes if tensor.dtype == torch.int32]
            if numbers and all(torch.equal(tensor, values) for tensor, values in numbers):
                self._follow(account, owned)
            self._torn = False
            raise
        self._follow(account, owned)
        self._poison()

    def _follow(self, account: Callable[[], None], owned: set[int]) -> None:
        account()
        self._torn = False
        if self.poison_freed:
            self._to_poison = (self._to_poison | owned) - self._owned()

    def _owned(self) -> set[int]:
        if self._torn:
            return set(range(self.num_pages))
        return {page for page, owners in enumerate(self._allocator.owners) if owners}

    def _poison(self) -> None:
        """Fill the pages freed since the last call with NaN."""
        if self._to_poison:
            self.state.poison(sorted(self._to_poison))
            self._to_poison = set()
