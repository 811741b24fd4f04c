"""Bounds at the end of the blocks of a cache, in several layouts of it."""

import pytest
import torch
from quest_ops import append_kv, update_bounds
from quest_ops.bounds import new_bounds
from quest_ops.vllm.block_tail import ALIGNMENT, bounds_in_blocks, tail_bytes

N, Hkv, S, D, LAYERS = 7, 2, 16, 64, 3


def cache(layout: str, dtype: torch.dtype, kind: str) -> list[torch.Tensor]:
    """The layers of a cache [N, Hkv, S, 2 * D] in blocks with room for bounds, as vLLM views its one allocation."""
    item = dtype.itemsize
    block = Hkv * S * 2 * D * item
    block += tail_bytes(block, Hkv, D, kind, dtype)
    raw = torch.full((N * LAYERS * block,), 0x7F, dtype=torch.int8)  # a NaN, where floats are read from it
    heads, tokens = (S * 2 * D, 2 * D) if layout.endswith("HNC") else (2 * D, Hkv * 2 * D)
    by_block = layout.startswith("B")
    layers = []
    for layer in range(LAYERS):
        stride = block * (LAYERS if by_block else 1)
        offset = layer * block * (1 if by_block else N)
        strides = (stride // item, heads, tokens, 1)
        layers.append(torch.as_strided(raw.view(dtype), (N, Hkv, S, 2 * D), strides, offset // item))
    return layers


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "cache"])
def test_bounds_in_blocks_are_those_of_a_pool(layout: str, dtype: torch.dtype, kind: str) -> None:
    layers = cache(layout, dtype, kind)
    table, lens = torch.tensor([[3, 0, 5], [6, 1, 2]], dtype=torch.int32), torch.tensor([40, 33], dtype=torch.int32)
    tokens = [torch.randn(2, 2, 40, Hkv, D, dtype=dtype) for _ in layers]
    views = [(*x.split(D, -1), *bounds_in_blocks(x, kind)) for x in layers]
    for (k, v), (k_cache, v_cache, k_bounds, k_scales) in zip(tokens, views, strict=True):
        append_kv(k, v, k_cache, v_cache, k_bounds, table, torch.zeros_like(lens), lens, k_scales)
    # After all layers are written, so that bounds in the keys of another layer or block would show.
    for (k, v), (k_cache, v_cache, k_bounds, k_scales) in zip(tokens, views, strict=True):
        pools = [torch.zeros(N, Hkv, S, D, dtype=dtype) for _ in range(2)]
        bounds, scales = new_bounds((N, Hkv), D, kind, dtype, "cpu")
        append_kv(k, v, *pools, bounds, table, torch.zeros_like(lens), lens, scales)
        for sequence in range(2):
            for position in range(lens[sequence]):
                page, slot = table[sequence, position // S], position % S
                assert torch.equal(k_cache[page, :, slot], k[sequence, position])
                assert torch.equal(v_cache[page, :, slot], v[sequence, position])
        used = table.flatten().long()
        assert torch.equal(k_bounds[used], bounds[used])
        assert k_scales is None or torch.equal(k_scales[used], scales[used])
        update_bounds(k_cache, k_bounds, table, lens, k_scales=k_scales)
        assert torch.equal(k_bounds[used], bounds[used])


def test_blocks_stay_aligned() -> None:
    for heads in (1, 2, 3, 8):
        for head_dim in (64, 80, 128):
            for dtype in (torch.float16, torch.float32):
                block = heads * 16 * 2 * head_dim * dtype.itemsize
                tail = tail_bytes(block, heads, head_dim, "int8", dtype)
                assert (block + tail) % ALIGNMENT == 0
                assert heads * (2 * head_dim + 4) <= tail < heads * (2 * head_dim + 4) + ALIGNMENT
