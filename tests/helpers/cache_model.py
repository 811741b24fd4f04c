"""A model of PagedKVCache in plain tensors, to compare it with."""

from __future__ import annotations

import math
from collections import Counter

import torch
from quest_ops import PagedKVCache, reference, update_bounds
from quest_ops.bounds import BoundsKind, new_bounds
from torch import Tensor


class History:
    """Drives a cache and records each sequence's keys and values [L, tokens, Hkv, D], on the CPU.

    ``loose`` holds the sequences whose last page was cut while a fork shared it. Its bounds then cover more tokens.
    """

    def __init__(self, cache: PagedKVCache, seed: int = 0):
        self.cache, self.random = cache, torch.Generator().manual_seed(seed)
        empty = cache.k_cache.new_empty(cache.num_layers, 0, cache.num_kv_heads, cache.head_dim, device="cpu")
        self.k, self.v = [empty] * cache.batch_size, [empty] * cache.batch_size
        self.loose: set[int] = set()

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random).to(self.cache.k_cache.dtype)

    def new_tokens(self, T: int, new_lens: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Random keys and values [L, B, T, Hkv, D]; NaN where a row is padded."""
        c = self.cache
        k, v = (self.randn(c.num_layers, c.batch_size, T, c.num_kv_heads, c.head_dim) for _ in range(2))
        for b, n in enumerate(new_lens or []):
            k[:, b, n:] = v[:, b, n:] = math.nan
        return k, v

    def record(self, k: Tensor, v: Tensor, new_lens: list[int] | None = None) -> None:
        for b in range(self.cache.batch_size):
            n = k.shape[2] if new_lens is None else new_lens[b]
            self.k[b] = torch.cat([self.k[b], k[:, b, :n]], 1)
            self.v[b] = torch.cat([self.v[b], v[:, b, :n]], 1)
            if n:
                self.loose.discard(b)

    def step(self, T: int, new_lens: list[int] | None = None) -> None:
        k, v = self.new_tokens(T, new_lens)
        self.cache.advance(T, new_lens)
        for layer in range(self.cache.num_layers):
            self.cache.append(layer, k[layer].to(self.cache.device), v[layer].to(self.cache.device))
        self.record(k, v, new_lens)

    def crop(self, tokens: int, sequence: int | None = None) -> None:
        self.cache.crop(tokens, sequence)
        owners, table = self.owners(), self.cache.page_table.tolist()
        page, cut = divmod(tokens, self.cache.page_size)
        for b in range(self.cache.batch_size) if sequence is None else (sequence,):
            if self.lengths[b] <= tokens:
                continue
            self.k[b], self.v[b] = self.k[b][:, :tokens], self.v[b][:, :tokens]
            self.loose.discard(b)
            if cut and owners[table[b][page]] > 1:
                self.loose.add(b)

    def fork(self, source: int, target: int) -> None:
        self.cache.fork(source, target)
        self.k[target], self.v[target] = self.k[source], self.v[source]
        self.loose.discard(target)
        if source in self.loose:
            self.loose.add(target)

    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        self.k[sequence], self.v[sequence] = self.k[sequence][:, :0], self.v[sequence][:, :0]
        self.loose.discard(sequence)

    @property
    def lengths(self) -> list[int]:
        return [k.shape[1] for k in self.k]

    def owners(self) -> Counter[int]:
        return Counter(page for page in self.cache.page_table.flatten().tolist() if page >= 0)

    def check(self) -> None:
        """Checks the public state of the cache against the record."""
        c, S = self.cache, self.cache.page_size
        assert c.seq_lens.tolist() == c.lengths == self.lengths
        assert c.free_pages == c.num_pages - len(self.owners())
        pools = [pool.cpu() for pool in (c.k_cache, c.v_cache, numbers(c.k_bounds, c.k_scales))]
        for b, row in enumerate(c.page_table.tolist()):
            used, reserved = -(-self.lengths[b] // S), [page for page in row if page >= 0]
            assert len(reserved) >= used
            assert row == reserved + [-1] * (len(row) - len(reserved))
            k, v, bounds = (pool[:, reserved[:used]] for pool in pools)
            for got, given in ((k, self.k[b]), (v, self.v[b])):
                tokens = got.transpose(2, 3).flatten(1, 2)[:, : self.lengths[b]]  # [L, tokens, Hkv, D]
                assert torch.equal(tokens, given)
            exact = self.recomputed(b).cpu()[:, reserved[:used]]
            for page in range(used):
                keys = self.k[b][:, page * S : (page + 1) * S]
                lower, upper = bounds[:, page].unbind(2)
                if c.std_factor is None:
                    assert (lower <= keys.amin(1)).all()
                    assert (upper >= keys.amax(1)).all()
                if b in self.loose and page == used - 1:
                    continue
                assert torch.equal(bounds[:, page], exact[:, page])
                if c.std_factor is None and c.k_scales is None:
                    assert torch.equal(lower, keys.amin(1))
                    assert torch.equal(upper, keys.amax(1))

    def recomputed(self, b: int) -> Tensor:
        """The values of the bounds that update_bounds computes from a sequence's keys in the cache."""
        c = self.cache
        where = (c.page_table[b : b + 1], c.seq_lens[b : b + 1])
        return torch.stack([bounds_of_keys(keys, *where, c.bounds, c.std_factor) for keys in c.k_cache])


def codes_of_keys(k_cache: Tensor, table: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's codes of one sequence's keys, k_cache [N, Hkv, S, D], with its pages in order."""
    N, Hkv, S, D = k_cache.shape
    keys = k_cache.transpose(1, 2).flatten(0, 1)[None, : int(length)]
    empty = torch.zeros(N, Hkv, S, D // 4, dtype=torch.uint8), torch.zeros(N, Hkv, S)
    return reference.append_codes(keys, *empty, table, torch.zeros_like(length))


def bounds_of_keys(
    k_cache: Tensor, page_table: Tensor, seq_lens: Tensor, bounds: BoundsKind, std_factor: float | None
) -> Tensor:
    """The values of the bounds that update_bounds computes."""
    N, Hkv, _, D = k_cache.shape
    k_bounds, k_scales = new_bounds((N, Hkv), D, bounds, k_cache.dtype, k_cache.device)
    update_bounds(k_cache, k_bounds, page_table, seq_lens, None, k_scales, std_factor)
    return numbers(k_bounds, k_scales)


def numbers(k_bounds: Tensor, k_scales: Tensor | None) -> Tensor:
    """The values of bounds: whole numbers times their scales, without rounding."""
    return k_bounds if k_scales is None else reference.dequantize(k_bounds, k_scales)


def poison(pool: Tensor, pages: list[int] | slice = slice(None)) -> None:
    """Fill pages of a pool with NaN, so that a read shows; bytes get 77, and their scales NaN."""
    pool[:, pages] = math.nan if pool.is_floating_point() else 77


def snapshot(cache: PagedKVCache) -> tuple[object, ...]:
    """The state that a failing call must not change; pools as bits, since NaN equals nothing."""
    pools = [pool.view(torch.uint8).clone() for pool in cache.pools]
    tables = [t.tolist() for t in (cache.page_table, cache.seq_lens, cache.start_lens, cache.new_lens)]
    return (*pools, tables, cache.lengths, cache.free_pages)


def same_snapshot(first: tuple[object, ...], second: tuple[object, ...]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )
