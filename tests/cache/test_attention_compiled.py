"""Steps of quest_attention: compiled, captured in a CUDA graph, and without a synchronisation."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.attention_model import BOUNDS, HKV, D, Model, S
from helpers.operator_cases import assert_accurate, assert_same_bits
from quest_ops import PagedKVCache, QuestConfig, quest_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@BOUNDS
def test_compiled_steps(device: str, backend: str, inside: bool, bounds: str) -> None:
    """One graph serves any number of steps and any lengths, with the eager result bit for bit."""
    torch._dynamo.reset()
    config = QuestConfig(24, S, dense_layers=1, bounds=bounds)
    eager, compiled = (Model(device, bounds=bounds) for _ in range(2))
    counter = CompileCounterWithBackend(backend)

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if inside:
            compiled.cache.advance(1)
        outs = [quest_attention(q[i], k[i], v[i], compiled.cache, i, config) for i in range(compiled.cache.num_layers)]
        return torch.stack(outs)

    step = torch.compile(layers, fullgraph=True, backend=counter)
    for model in (eager, compiled):
        model.attend(29, config, [29, 3])
        model.attend(1, config)
    compiled.cache.reserve(40)
    for _ in range(20):
        expected = eager.attend(1, config)
        q, k, v = compiled.inputs(1)
        if not inside:
            compiled.cache.advance(1)
        assert_same_bits(step(q, k, v), expected)
    assert counter.frame_count == 1
    if inside:
        assert compiled.cache.sync_lengths() == [50, 24]
    compiled.check()


@BOUNDS
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
def test_a_batch_marked_dynamic(device: str, inside: bool, bounds: str) -> None:
    """Caches of the same number of pages share the code of all batch sizes."""
    torch._dynamo.reset()
    config = QuestConfig(24, S, dense_layers=1, bounds=bounds)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, k: Tensor, v: Tensor, cache: PagedKVCache) -> Tensor:
        if inside:
            cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], cache, i, config) for i in range(2)])

    for batch in (3, 2, 5):
        eager, compiled = (Model(device, batch=batch, bounds=bounds, num_pages=60) for _ in range(2))
        for model in (eager, compiled):
            model.attend(29, config)
        compiled.cache.reserve(3)
        for _ in range(3):
            expected = eager.attend(1, config)
            inputs = compiled.inputs(1)
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 1)
            if not inside:
                compiled.cache.advance(1)
            assert_same_bits(step(*inputs, compiled.cache), expected)
        compiled.cache.sync_lengths()
        compiled.check()
    # The first cache is one of a kind to Dynamo. From the second on, its batch size is a symbol too.
    assert counter.frame_count <= 2


@BOUNDS
def test_a_compiled_step_copies_no_cache(device: str, bounds: str) -> None:
    torch._dynamo.reset()
    model, config = Model(device, layers=3, bounds=bounds), QuestConfig(24, S, dense_layers=1, bounds=bounds)
    model.attend(29, config)

    @torch.compile(fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([quest_attention(q[i], k[i], v[i], model.cache, i, config) for i in range(3)])

    model.cache.advance(1)
    out, (code, *_) = run_and_get_code(step, *model.inputs(1))
    model.assert_right(out, config)
    assert [code.count(f"{name}.default(") for name in ("append_kv", "decode_step")] == [0, 3]
    pools = "|".join(re.escape(str(tuple(t.shape))) for t in model.cache.pools)
    assert re.search(rf"assert_size_stride\(\w+, ({pools})", code)
    assert not re.search(rf"empty_strided\w*\(({pools})", code)


def test_compiled_prefill_and_ragged_steps(device: str) -> None:
    """Steps of several tokens compile into one graph too, without the host's lengths."""
    torch._dynamo.reset()
    model, config = Model(device, batch=3), QuestConfig(24, S, dense_layers=1)
    lens = torch.zeros(3, dtype=torch.int32, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q: Tensor, k: Tensor, v: Tensor, new_lens: Tensor) -> Tensor:
        model.cache.advance(q.shape[2], new_lens)
        return torch.stack([quest_attention(q[i], k[i], v[i], model.cache, i, config) for i in range(2)])

    model.cache.reserve(96)
    for T, real in ((20, [20, 7, 0]), (16, [0, 16, 9]), (4, [4, 0, 3]), (1, [1, 1, 0])):
        q, k, v = model.inputs(T, real)
        lens.copy_(torch.tensor(real))
        model.assert_right(step(q, k, v, lens), config)
    model.cache.sync_lengths()
    model.check()


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOUNDS
def test_steps_in_a_cuda_graph(inside: bool, dtype: torch.dtype, bounds: str) -> None:
    """In bfloat16 a step may be a single launch."""
    config, device = QuestConfig(24, S, dense_layers=1, bounds=bounds), "cuda"
    eager, captured = (Model(device, dtype=dtype, bounds=bounds) for _ in range(2))
    for model in (eager, captured):
        model.attend(29, config, [29, 3])
        model.attend(1, config)
    captured.cache.reserve(40)
    q, k, v = (torch.zeros(2, 2, 1, heads, D, dtype=dtype, device=device) for heads in (4, HKV, HKV))

    def step() -> Tensor:
        if inside:
            captured.cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], captured.cache, i, config) for i in range(2)])

    graph = torch.cuda.CUDAGraph()
    if not inside:
        captured.cache.advance(1)  # captured code runs only in a replay
    with torch.cuda.graph(graph):
        out = step()
    for i in range(20):
        expected = eager.attend(1, config)
        for static, new in zip((q, k, v), captured.inputs(1), strict=True):
            static.copy_(new)
        if not inside and i:
            captured.cache.advance(1)
        graph.replay()
        assert_same_bits(out, expected)
    assert captured.cache.sync_lengths() == [50, 24]
    captured.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOUNDS
def test_decode_never_waits_for_the_gpu(dtype: torch.dtype, bounds: str) -> None:
    model = Model("cuda", batch=2, dtype=dtype, bounds=bounds)
    config = QuestConfig(24, S, dense_layers=1, bounds=bounds)
    model.attend(40, config)
    steps = [model.inputs(1) for _ in range(20)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for q, k, v in steps:
            model.cache.advance(1)
            for layer in range(2):
                out = quest_attention(q[layer], k[layer], v[layer], model.cache, layer, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_accurate(out, *model.expected(config, 1), dtype)
    model.check()
