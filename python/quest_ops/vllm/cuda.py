"""The backend on CUDA, on vLLM's FlashAttention backend. It has not been run: docs/vllm.md says why.

FlashAttention reads the cache as the operators do, so prompt tokens need no other layout.
"""

from __future__ import annotations

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from .backend import QuestBackend, QuestBuilder, QuestImpl


class CUDAQuestBackend(QuestBackend, FlashAttentionBackend):
    """In the place of ``FLASH_ATTN``."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The layouts in which a block of a layer is compact, so that bounds can follow it."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # rows are made from the host's lengths

    @staticmethod
    def get_impl_cls() -> type[CUDAQuestImpl]:
        return CUDAQuestImpl

    @staticmethod
    def get_builder_cls() -> type[CUDAQuestBuilder]:
        return CUDAQuestBuilder


class CUDAQuestBuilder(QuestBuilder, FlashAttentionMetadataBuilder):
    # Steps in which each request decodes the same number of tokens; steps with prompts have no fixed shapes.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class CUDAQuestImpl(QuestImpl, FlashAttentionImpl):
    pass
