"""PagedKVCache under calls in any order, against a plain record of each sequence's tokens.

Decoded steps are compared bit for bit with a contiguous cache made of the record. Freed pages hold NaN. A call may fail
at any operation of PyTorch. `QUEST_OPS_TEST_EXAMPLES=2000` in the environment tries more.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.cache_model import History, poison, same_snapshot, snapshot
from helpers.failing import FailingAt
from helpers.operator_cases import assert_same_bits
from helpers.small_caches import S, make
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from quest_ops import CacheFullError, PagedKVCache, QuestConfig, ops, page_view_blhd, quest_attention
from quest_ops.bounds import new_bounds
from quest_ops.kv_state import KVState
from torch import Tensor

B, GROUP, MAX_TOKENS = 3, 2, 40
SEQUENCE = st.integers(0, B - 1)
LENS = st.tuples(*[st.integers(0, 8)] * B).filter(any)


@contextlib.contextmanager
def blind() -> Iterator[None]:
    """Calls as the host makes them in compiled and captured code, which it does not see when that runs."""
    with patch.object(PagedKVCache, "_host_is_blind", return_value=True):
        yield


class CacheMachine(RuleBasedStateMachine):
    device = "cpu"

    @initialize(
        seed=st.integers(0, 1000),
        num_pages=st.integers(5, 15),
        bounds=st.sampled_from(("cache", "int8", "int4")),
        std_factor=st.sampled_from((None, 1.0)),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
        group_reduce=st.sampled_from(("max", "sum", "none")),
    )
    def start(self, seed: int, num_pages: int, group_reduce: Any, **options: Any) -> None:
        cache = make(self.device, max_tokens=MAX_TOKENS, num_pages=num_pages, poison_freed=True, **options)
        kind = {"bounds": options["bounds"], "std_factor": options["std_factor"]}
        self.config = QuestConfig(3 * S, S, dense_layers=1, group_reduce=group_reduce, **kind)
        self.history, self.failed = History(cache, seed), False

    @property
    def cache(self) -> PagedKVCache:
        return self.history.cache

    # Room

    def has_room(self, lens: list[int]) -> bool:
        """Whether the cache has room for these tokens; checks that an impossible step changes nothing."""
        lengths = self.history.lengths
        too_long = any(n and have + n > MAX_TOKENS for have, n in zip(lengths, lens, strict=True))
        reserved = (self.cache.page_table >= 0).sum(1).tolist()
        new = [
            max(0, -(-(have + n) // S) - pages) if n else 0
            for have, n, pages in zip(lengths, lens, reserved, strict=True)
        ]
        if not too_long and sum(new) + self.copies(lens) <= self.cache.free_pages:
            return True
        before = snapshot(self.cache)
        with pytest.raises(CacheFullError):
            self.cache.advance(MAX_TOKENS, lens)
        assert same_snapshot(before, snapshot(self.cache))
        return False

    def counted(self, T: int, lens: list[int] | None, how: str) -> list[int]:
        """The tokens that the host counts for each sequence. It does not read numbers on a GPU, and counts T."""
        unread = how == "device" and self.device == "cuda"
        return [T] * B if lens is None or unread else lens

    def copies(self, lens: list[int]) -> int:
        """Shared partial pages that several owners are about to write: all but a last owner copy them."""
        writers: dict[int, int] = {}
        for b, n in enumerate(lens):
            if n and self.history.lengths[b] % S:
                page = int(self.cache.page_table[b, self.history.lengths[b] // S])
                writers[page] = writers.get(page, 0) + 1
        owners = self.history.owners()
        return sum(min(count, owners[page] - 1) for page, count in writers.items())

    # Steps

    def advance(self, T: int, lens: list[int] | None, how: str) -> None:
        """By host numbers, by a device tensor, or unseen by the host as in a CUDA graph."""
        given = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=self.device)
        if how != "unseen":
            self.cache.advance(T, lens if how == "host" else given)
            return
        for b, n in enumerate(lens or [T] * B):
            self.cache.reserve(n, b)
        with blind():
            self.cache.advance(T, given)
        with pytest.raises(RuntimeError, match=r"call sync_lengths\(\) first"):
            _ = self.cache.lengths

    def finish(self, k: Tensor, v: Tensor, lens: list[int] | None, how: str) -> None:
        self.history.record(k, v, lens)
        if how != "host":
            assert self.cache.sync_lengths() == self.history.lengths

    @rule(lens=LENS, T=st.integers(0, 3), even=st.booleans(), how=st.sampled_from(("host", "device", "unseen")))
    def append(self, lens: tuple[int, ...], T: int, even: bool, how: str) -> None:
        """Ragged, or T tokens for each; more than a decode step takes, too."""
        given = None if even else [2 * n for n in lens]
        T = T + 1 if given is None else max(given) + T
        if not self.has_room(self.counted(T, given, how)):
            return
        k, v = self.history.new_tokens(T, given)
        self.advance(T, given, how)
        for layer in range(self.cache.num_layers):
            self.cache.append(layer, k[layer].to(self.device), v[layer].to(self.device))
        self.finish(k, v, given, how)

    @rule(lens=LENS, T=st.integers(1, 8), even=st.booleans(), how=st.sampled_from(("host", "device", "unseen")))
    def decode(self, lens: tuple[int, ...], T: int, even: bool, how: str) -> None:
        given = None if even else [min(n, T) for n in lens]
        if not any(given or [T]) or not self.has_room(self.counted(T, given, how)):
            return
        k, v = self.history.new_tokens(T, given)
        L, Hkv, D = self.cache.num_layers, self.cache.num_kv_heads, self.cache.head_dim
        q = self.history.randn(L, B, T, GROUP * Hkv, D)
        self.advance(T, given, how)
        new = [[x[layer].to(self.device) for x in (q, k, v)] for layer in range(L)]
        outs = [quest_attention(*new[layer], self.cache, layer, self.config).cpu() for layer in range(L)]
        self.finish(k, v, given, how)
        for layer, out in enumerate(outs):
            for b, n in enumerate(given or [T] * B):
                assert_same_bits(out[b, :n], self.contiguous(layer, b, q[layer, b, :n], given is not None))
                assert not out[b, n:].any()

    def contiguous(self, layer: int, b: int, q: Tensor, ragged: bool) -> Tensor:
        """The attention of the record's tokens in a contiguous cache. In a ragged step each token goes alone."""
        keys, values = self.history.k[b][layer], self.history.v[b][layer]
        pad = (0, 0, 0, 0, 0, MAX_TOKENS - len(keys))
        view = page_view_blhd(*(torch.nn.functional.pad(x, pad)[None].to(self.device) for x in (keys, values)), S)
        steps = [(len(keys) - len(q) + t + 1, q[t : t + 1]) for t in range(len(q))] if ragged else [(len(keys), q)]
        outs = []
        for length, queries in steps:
            lens, queries = torch.tensor([length], dtype=torch.int32).to(self.device), queries[None].to(self.device)
            pages = None
            if layer >= self.config.dense_layers:
                pool = (len(view.k_cache), self.cache.num_kv_heads)
                kind = (self.cache.head_dim, self.cache.bounds, keys.dtype)
                k_bounds, k_scales = new_bounds(pool, *kind, self.device)
                written = torch.tensor([len(keys)], dtype=torch.int32).to(self.device)
                where = (view.page_table, written, None, k_scales, self.config.std_factor)
                ops.update_bounds(view.k_cache, k_bounds, *where)
                scores = ops.estimate(queries, k_bounds, view.page_table, lens, S, k_scales)
                k, reduce, sinks, recents = self.config.selection
                pages = ops.topk_pages(scores, lens, S, k, self.cache.num_kv_heads, reduce, sinks, recents)
            outs.append(ops.sparse_decode(queries, view.k_cache, view.v_cache, view.page_table, lens, pages)[0][0])
        return torch.cat(outs).cpu() if outs else q

    # Sequences

    @rule(b=SEQUENCE, tokens=st.integers(0, 16))
    def reserve(self, b: int, tokens: int) -> None:
        if self.has_room([tokens if i == b else 0 for i in range(B)]):
            self.cache.reserve(tokens, b)

    @rule(b=SEQUENCE | st.none(), tokens=st.integers(0, MAX_TOKENS))
    def crop(self, b: int | None, tokens: int) -> None:
        self.history.crop(tokens, b)

    @rule(source=SEQUENCE, step=st.integers(1, B - 1))
    def fork(self, source: int, step: int) -> None:
        self.history.fork(source, (source + step) % B)

    @rule(b=SEQUENCE)
    def free(self, b: int) -> None:
        self.history.free(b)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.forget()

    def forget(self) -> None:
        for record in (self.history.k, self.history.v):
            record[:] = [x[:, :0] for x in record]
        self.history.loose.clear()
        self.failed = False

    @rule()
    def sync(self) -> None:
        assert self.cache.sync_lengths() == self.history.lengths

    @rule(how=st.sampled_from(("deepcopy", "pickle")))
    def copy(self, how: str) -> None:
        """The copy goes on, and what happens to the original does not reach it."""
        original = self.cache
        self.history.cache = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
        for pool in original.pools:
            poison(pool)
        original.reset()

    # Failures

    def numbers(self) -> list[Any]:
        c = self.cache
        return [*(x.tolist() for x in (c.page_table, c.seq_lens, c.start_lens, c.new_lens)), c.lengths, c.free_pages]

    def disturbed(self, call: Callable[[], object], n: int, done: bool) -> bool:
        """Call with a failure at operation ``n``. Returns whether the call still has to be made."""
        before = self.numbers()
        self.failed = True
        error = KeyboardInterrupt() if done else torch.OutOfMemoryError()
        try:
            with FailingAt(n, error, done):
                call()
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            return self.numbers() == before
        return False

    @rule(
        name=st.sampled_from(("reserve", "crop", "fork", "free", "reset")),
        b=SEQUENCE,
        tokens=st.integers(1, 20),
        n=st.integers(1, 25),
        done=st.booleans(),
    )
    def fail(self, name: str, b: int, tokens: int, n: int, done: bool) -> None:
        """Each of these calls may be repeated, whether the failure came before its change or after."""
        target = (b + 1) % B
        if name == "reserve" and not self.has_room([tokens if i == b else 0 for i in range(B)]):
            return
        calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "reserve": (lambda: self.cache.reserve(tokens, b), lambda: self.cache.reserve(tokens, b)),
            "crop": (lambda: self.cache.crop(tokens, b), lambda: self.history.crop(tokens, b)),
            "fork": (lambda: self.cache.fork(b, target), lambda: self.history.fork(b, target)),
            "free": (lambda: self.cache.free(b), lambda: self.history.free(b)),
            "reset": (self.cache.reset, self.cache.reset),
        }
        call, repeat = calls[name]
        missing = self.disturbed(call, n, done)
        after = self.numbers()
        repeat()
        if name == "reset":
            self.forget()
        if not missing:
            assert self.numbers() == after

    @rule(lens=LENS, n=st.integers(1, 30), m=st.integers(1, 12), done=st.booleans())
    def fail_in_a_step(self, lens: tuple[int, ...], n: int, m: int, done: bool) -> None:
        """In advance and in the layers' appends, which may be repeated."""
        given, T = list(lens), max(lens)
        if not self.has_room(given):
            return
        k, v = self.history.new_tokens(T, given)
        if self.disturbed(lambda: self.cache.advance(T, given), n, done):
            self.cache.advance(T, given)
        for layer in range(self.cache.num_layers):
            new = [layer, k[layer].to(self.device), v[layer].to(self.device)]
            wrote = True
            try:
                with FailingAt(m, KeyboardInterrupt(), done):
                    self.cache.append(*new)
            except KeyboardInterrupt:
                wrote = False
            if not wrote:
                self.cache.append(*new)
        self.history.record(k, v, given)

    # What always holds

    @invariant()
    @precondition(lambda self: hasattr(self, "history"))
    def the_cache_is_the_record(self) -> None:
        self.history.check()

    @invariant()
    @precondition(lambda self: hasattr(self, "history") and not self.failed)
    def free_pages_hold_nan(self) -> None:
        free = sorted(set(range(self.cache.num_pages)) - set(self.history.owners()))
        for pool in self.cache.pools:
            assert not pool.is_floating_point() or pool[:, free].isnan().all()


def test_any_order_of_calls(device: str) -> None:
    class Machine(CacheMachine):
        pass

    Machine.device = device
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=2 * settings.default.max_examples, stateful_step_count=40)
    )


@pytest.mark.parametrize("method", ["copy_pages", "poison", "bounds_of_page", "append"])
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The machine fails where the device's tensors miss one of these changes."""

    class Machine(CacheMachine):
        pass

    monkeypatch.setattr(KVState, method, lambda *_: [])
    # The first example that fails ends the search, so a large number costs nothing.
    quick = settings(max_examples=300, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=quick)
