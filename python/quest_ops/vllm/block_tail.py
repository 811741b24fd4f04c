"""Page bounds at the end of each block of an engine's cache.

vLLM lets a block be larger than its keys and values. The bounds take the rest. So the memory profile counts them, no
second pool has to be kept in step with the blocks, and their addresses stay as the cache's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bounds import BoundsKind, bounds_dtype, bounds_width, bytes_of_bounds

#: A block's bytes are a multiple of this, since vLLM's kernels load 16 bytes at a time and TMA wants aligned strides.
ALIGNMENT = 256


def tail_bytes(block_bytes: int, num_kv_heads: int, head_dim: int, kind: BoundsKind, dtype: torch.dtype) -> int:
    """Bytes that bounds add to a block of ``block_bytes``, alignment included."""
    with_bounds = block_bytes + num_kv_heads * bytes_of_bounds(head_dim, kind, dtype)
    return -(-with_bounds // ALIGNMENT) * ALIGNMENT - block_bytes


def bounds_in_blocks(kv_cache: Tensor, kind: BoundsKind) -> tuple[Tensor, Tensor | None]:
    """The bounds of a layer, as views of the end of its blocks.

    Args:
        kv_cache: [N, Hkv, S, 2 * D], vLLM's view of a layer. A block's keys and values are compact, in any order of
            Hkv and S, and :func:`tail_bytes` follow.
        kind: of the bounds.

    Returns:
        k_bounds [N, Hkv, 2, D] or, of 4 bits, [N, Hkv, 2, D / 2]; and k_scales [N, Hkv] float32 or None.
    """
    N, Hkv, S, width = kv_cache.shape
    D, size, storage = width // 2, kv_cache.element_size(), kv_cache.untyped_storage()
    stride = kv_cache.stride(0) * size
    start = int(kv_cache.storage_offset()) * size + Hkv * S * width * size

    def view(dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        empty = torch.empty(0, dtype=dtype, device=kv_cache.device)
        return empty.set_(storage, offset // dtype.itemsize, shape, strides)

    dtype, row = bounds_dtype(kind, kv_cache.dtype), bounds_width(kind, D)
    k_bounds = view(dtype, start, (N, Hkv, 2, row), (stride // dtype.itemsize, 2 * row, row, 1))
    if kind == "cache":
        return k_bounds, None
    scales = torch.float32
    return k_bounds, view(scales, start + Hkv * 2 * row * dtype.itemsize, (N, Hkv), (stride // scales.itemsize, 1))


def padded_spec(spec: Any, kind: BoundsKind) -> Any:
    """VLLM's description of a layer's cache, ``AttentionSpec``, with room for bounds in each block."""
    from dataclasses import replace

    block = spec.unpadded_page_size_bytes
    return replace(
        spec, page_size_padded=block + tail_bytes(block, spec.num_kv_heads, spec.head_size, kind, spec.dtype)
    )
