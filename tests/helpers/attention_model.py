"""A history whose steps attend, and their expected results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quest_ops import PagedKVCache, QuestConfig, attention_path, quest_attention, reference
from torch import Tensor

from helpers import torch_baseline
from helpers.cache_model import History, bounds_of_keys, codes_of_keys, poison
from helpers.operator_cases import assert_accurate

S, HKV, D = 8, 2, 64
BOUNDS = pytest.mark.parametrize("bounds", ["cache", "int8", "int4"])


class Model(History):
    """A history whose steps attend; ``expected`` computes the last step's result."""

    def __init__(self, device: str, heads: int = 4, layers: int = 2, batch: int = 2, seed: int = 0, **cache: Any):
        options = {"max_tokens": 96, "page_size": S, "dtype": torch.float32} | cache
        super().__init__(PagedKVCache(layers, HKV, D, batch_size=batch, device=device, **options), seed)
        for pool in self.cache.pools:
            poison(pool)
        self.heads, self.lens = heads, [0] * batch

    def inputs(self, T: int, new_lens: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of all layers, [L, B, T, heads, D], on the device; recorded."""
        k, v = self.new_tokens(T, new_lens)
        q = self.randn(*k.shape[:3], self.heads, D)
        self.q, self.lens = q, [T] * len(self.k) if new_lens is None else new_lens
        self.record(k, v, new_lens)
        return tuple(x.to(self.cache.device) for x in (q, k, v))

    def attend(
        self, T: int, config: QuestConfig, new_lens: list[int] | None = None, scale: float | None = None
    ) -> Tensor:
        q, k, v = self.inputs(T, new_lens)
        self.cache.advance(T, new_lens)
        layers = range(self.cache.num_layers)
        return torch.stack([quest_attention(q[i], k[i], v[i], self.cache, i, config, scale) for i in layers])

    def expected(self, config: QuestConfig, layer: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """The last step's output of a layer [B, T, Hq, D], from the history alone; padding gives 0.

        Returns it in float64, and by plain PyTorch in the cache's dtype, in several orders of summation.
        """
        path = attention_path(self.cache, layer, config, self.q.shape[2])
        scale = D**-0.5 if scale is None else scale
        exact = torch.zeros_like(self.q[layer], dtype=torch.float64)
        plain = torch.zeros((torch_baseline.RUNS, *exact.shape), dtype=self.q.dtype)
        for b, n in enumerate(self.lens):
            if n == 0:
                continue
            q, k, v = self.q[layer, b, :n], self.k[b][layer], self.v[b][layer]
            if path == "sparse":
                exact[b, :n], plain[:, b, :n] = quest(q, k, v, config.at(layer), scale)
                continue
            exact[b, :n] = dense(*(x.double() for x in (q, k, v)), scale)
            attend = dense if path == "dense" else torch_attention
            device = "cpu" if path == "dense" else self.cache.device
            (runs,) = torch_baseline.in_several_orders(
                lambda *x, attend=attend: (attend(*x),), *(x.to(device) for x in (q, k, v)), scale
            )
            plain[:, b, :n] = runs.cpu()
        return exact, plain

    def assert_right(self, out: Tensor, config: QuestConfig, scale: float | None = None) -> None:
        for layer in range(self.cache.num_layers):
            assert_accurate(out[layer], *self.expected(config, layer, scale), self.cache.k_cache.dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of q [n, Hq, D], the last n tokens of k, v [tokens, Hkv, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~causal(q.shape[1], k.shape[1]), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by PyTorch's own kernels, which also compute a prefill."""
    mask = causal(len(q), len(k)).to(q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def causal(new: int, tokens: int) -> Tensor:
    return torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)


def quest(q: Tensor, k: Tensor, v: Tensor, config: QuestConfig, scale: float) -> tuple[Tensor, Tensor]:
    """The reference's selection, then attention by the reference and by plain PyTorch in several orders."""
    pages = -(-len(k) // S)
    table, length = torch.arange(pages, dtype=torch.int32)[None], torch.tensor([len(k)], dtype=torch.int32)
    padded = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * S - len(x))) for x in (k, v))
    k, v = (x.unflatten(0, (pages, S)).transpose(1, 2) for x in padded)
    bounds = bounds_of_keys(k, table, length, config.bounds, config.std_factor)
    scores = reference.estimate(q[None], bounds, table, length, S)
    how = (config.group_reduce, config.sink_pages, config.recent_pages, scale)
    if config.candidates:
        candidates = reference.topk_pages(scores, length, S, config.candidate_pages, HKV, *how)
        scores = reference.rerank_pages(q[None], *codes_of_keys(k, table, length), table, length, candidates)
    chosen = reference.topk_pages(scores, length, S, config.num_pages, HKV, *how)
    arguments = (q[None], k, v, table, length, chosen, scale)
    return reference.sparse_decode(*arguments)[0][0], torch_baseline.in_several_orders(
        torch_baseline.sparse_decode, *arguments
    )[0][:, 0]
