"""The backend on vLLM's CPU build.

vLLM's CPU kernel keeps a block's keys transposed, or packed for AMX, which the operators do not read. Sparse layers
store keys as they are. So their prompt tokens go to vLLM's kernel with the blocks of their requests rewritten in its
layout, one layer at a time. The rewriting takes about 1 % of a prefill: see bench/vllm_decode.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .backend import QuestBackend, QuestBuilder, QuestImpl


class CPUQuestBackend(QuestBackend, CPUAttentionBackend):
    """In the place of ``CPU_ATTN``."""

    @staticmethod
    def get_impl_cls() -> type[CPUQuestImpl]:
        return CPUQuestImpl

    @staticmethod
    def get_builder_cls() -> type[CPUQuestBuilder]:
        return CPUQuestBuilder


class CPUQuestBuilder(QuestBuilder, CPUAttentionMetadataBuilder):
    pass


class CPUQuestImpl(QuestImpl, CPUAttentionBackendImpl):
    def _write(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:  # noqa: ARG002
        S = kv_cache.shape[2]
        kv_cache[slot_mapping // S, :, slot_mapping % S] = torch.cat([key, value], -1)

    def _for_own_kernel(self, layer: Any, kv_cache: Tensor, metadata: Any) -> tuple[Tensor, Any]:
        _, Hkv, S, width = kv_cache.shape
        requests, pages = len(metadata.seq_lens), -(-metadata.max_seq_len // S)
        table = metadata.block_table[:, :pages]
        # Entries past a request's blocks hold any block, which is copied and not read.
        tokens = kv_cache[table.flatten().long()].transpose(1, 2).reshape(-1, Hkv, width)
        cache = torch.empty((requests * pages, Hkv, S, width), dtype=kv_cache.dtype)
        key, value = tokens.split(width // 2, -1)
        slots = torch.arange(len(tokens))
        CPUAttentionBackendImpl.do_kv_cache_update(self, layer, key, value, cache, slots)
        own = torch.arange(requests * pages, dtype=torch.int32).view(requests, pages)
        return cache, replace(metadata, block_table=own)
