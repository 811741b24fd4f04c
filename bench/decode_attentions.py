"""The attentions of a whole model's step: over pages by quest_ops, over contiguous caches by PyTorch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from quest_ops import PagedKVCache, QuestConfig, attention_path, quest_attention, select_pages
from quest_ops.bounds import bytes_of_bounds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from whole_model import CHUNK, Shape, contents

#: PyTorch's dense kernels on a device. On the CPU it chooses by itself.
BACKENDS: dict[str, dict[str, SDPBackend | None]] = {
    "cuda": {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"SDPA": None},
}


class Nothing:
    """No attention, no cache: the rest of the step."""

    def __init__(self, batch: int, context: int, device: str) -> None:
        self.position = torch.full((batch,), context - 1, dtype=torch.int32, device=device)

    def advance(self) -> Tensor:
        return self.position

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:  # noqa: ARG002 - the others' arguments
        return q

    def dense_layers(self) -> list[bool]:
        """Whether each layer that ``decode_step`` serves is dense."""
        return []


class Contiguous(Nothing):
    """PyTorch's attention over a cache of exactly ``context`` tokens, the last of which every step writes anew.

    Keys and values of a layer are one tensor [B, 2 * Hkv, context, D], so that one kernel writes both.
    """

    def __init__(self, shape: Shape, batch: int, context: int, dtype: torch.dtype, device: str) -> None:
        super().__init__(batch, context, device)
        self.shape, self.backend = shape, None
        size = (batch, 2 * shape.kv_heads, context, shape.head_dim)
        self.caches = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        for start, layer, kv in chunks(shape, context - 1, dtype, device):
            self.caches[layer][:, :, start : start + len(kv)] = kv.transpose(0, 1)

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        cache, heads = self.caches[layer], self.shape.kv_heads
        cache[:, :, -1].copy_(kv)
        with sdpa_kernel(self.backend) if self.backend else nullcontext():
            out = scaled_dot_product_attention(
                q[:, :, None], cache[:, :heads], cache[:, heads:], enable_gqa=self.shape.heads != heads
            )
        return out[:, :, 0]


class Paged:
    """Quest over a PagedKVCache: a layer's step is one ``decode_step``, which reads every page in dense layers.

    Args:
        shape: of the model.
        kind: a configuration with the cache's page_size, bounds and std_factor; ``config`` may differ in the rest.
        batch: B. All sequences have the same keys, each in memory of its own.
        filled: tokens in the cache before the first step.
        steps: that the cache has room for.
        capacity: tokens that a sequence may have, at least. A page is added, so that a budget of all tokens does not
            hold the capacity, which would make the layers dense.
        dtype, device: of the cache.
    """

    def __init__(
        self,
        shape: Shape,
        kind: QuestConfig,
        batch: int,
        filled: int,
        steps: int,
        capacity: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.shape, self.config, self.filled, self.steps = shape, kind, filled, steps
        self.cache = PagedKVCache(
            shape.layers,
            shape.kv_heads,
            shape.head_dim,
            max_tokens=max(capacity, filled + steps) + kind.page_size,
            batch_size=batch,
            page_size=kind.page_size,
            dtype=dtype,
            bounds=kind.bounds,
            std_factor=kind.std_factor,
            kept_pages=max(capacity, filled + steps) // kind.page_size,  # config may have any budget
            device=device,
        )
        # A new pool hands out its pages in order; in one that has served for a while they lie anywhere.
        random.Random(0).shuffle(self.cache._allocator.free)
        for start, layer, kv in chunks(shape, filled, dtype, device):
            if layer == 0:
                self.cache.advance(min(CHUNK, filled - start))
            k, v = kv.expand(batch, *kv.shape).chunk(2, 2)
            self.cache.append(layer, k, v)
        self.cache.reserve(steps)

    def dense_layers(self) -> list[bool]:
        """Whether each layer that ``decode_step`` serves is dense."""
        return [attention_path(self.cache, layer, self.config) == "dense" for layer in range(self.shape.layers)]

    def rewind(self) -> None:
        """Go back to the tokens before the first step."""
        self.cache.sync_lengths()
        self.cache.crop(self.filled)
        self.cache.reserve(self.steps)

    def advance(self) -> Tensor:
        self.cache.advance(1)
        return self.cache.start_lens

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.chunk(2, 1)
        return quest_attention(q, k, v, self.cache, layer, self.config)

    def selections_differ(self) -> float:
        """Of the pages that one random query selects in the last layer, the share that another one does not."""
        shape, cache = self.shape, self.cache
        generator, size = torch.Generator(cache.device).manual_seed(0), (2, shape.heads, shape.head_dim)
        q = torch.randn(size, generator=generator, device=cache.device).to(cache.k_cache.dtype)
        _, _, k_bounds, k_scales = cache.layer(shape.layers - 1)
        table, lens = cache.page_table[:1].repeat(2, 1), cache.seq_lens[:1].repeat(2)
        first, second = select_pages(q, k_bounds, table, lens, self.config, k_scales=k_scales)
        real = first >= 0
        found = (first[:, :, None] == second[:, None]).any(-1)
        return 1 - float(found[real].float().mean())


def chunks(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> Iterator[tuple[int, int, Tensor]]:
    """First token, layer, and keys and values [n, 2 * Hkv, D], for all layers before the next tokens."""
    layers = [contents(shape, layer, tokens, dtype, device) for layer in range(shape.layers)]
    for start in range(0, tokens, CHUNK):
        for layer, kv in enumerate(layers):
            yield start, layer, torch.cat(next(kv), 1)


def cache_bytes(shape: Shape, kinds: list[QuestConfig], batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Keys, values and the largest bounds of these kinds, in all layers."""
    bounds = max(bytes_of_bounds(shape.head_dim, kind.bounds, dtype) / kind.page_size for kind in kinds)
    return int(batch * tokens * (shape.token_bytes(dtype) + shape.layers * shape.kv_heads * bounds))
