"""Decode steps as CUDA graphs, by hand and by torch.compile: 500 replays give the tokens of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers.decoder_example import assert_same_cache, decoder, make, prompts
from quest_ops import PagedKVCache, QuestConfig, quest_attention
from torch import Tensor

pytestmark = pytest.mark.gpu

STEPS = 500
# The context grows from 1 page to 32. Past the budget of 8 pages the second layer is sparse.
CONFIG = decoder.DecoderConfig(64, 64, 2, 4, 2, 64, 96, quest=QuestConfig(128, 16, dense_layers=1))
WIDE_BOUNDS = replace(CONFIG, quest=replace(CONFIG.quest, bounds="cache"))
CONFIGS = pytest.mark.parametrize("config", [WIDE_BOUNDS, CONFIG], ids=["cache", "int4"])
PROMPT = 9


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()


def prefilled(model: decoder.Decoder, batch: int = 2) -> tuple[PagedKVCache, Tensor]:
    cache = model.new_cache(batch, PROMPT + STEPS + 1)
    for pool in cache.pools:
        pool.zero_()
    return cache, decoder.prefill(model, prompts("cuda", batch, PROMPT), cache)


def assert_decodes_as_eager(
    model: decoder.Decoder, make_step: Callable[[PagedKVCache], decoder.Step], batch: int = 2
) -> None:
    expected, token = prefilled(model, batch)
    tokens = decoder.decode(model.step, token, expected, STEPS)
    cache = model.new_cache(batch, expected.max_tokens)
    step = make_step(cache)
    cache.reset()
    for pool in cache.pools:
        pool.zero_()
    token = decoder.prefill(model, prompts("cuda", batch, PROMPT), cache)
    addresses = [x.data_ptr() for x in (cache.k_cache, cache.page_table, cache.seq_lens)]
    assert torch.equal(decoder.decode(step, token, cache, STEPS), tokens)
    assert cache.lengths == [PROMPT + STEPS] * batch
    assert addresses == [x.data_ptr() for x in (cache.k_cache, cache.page_table, cache.seq_lens)]
    assert_same_cache(cache, expected)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step(config: decoder.DecoderConfig, dtype: torch.dtype) -> None:
    """In bfloat16 a layer's step may be a single launch."""
    model = make("cuda", config).to(dtype)
    assert_decodes_as_eager(model, lambda cache: decoder.capture(model.step, cache))


@CONFIGS
def test_a_captured_step_is_replayed_for_another_prompt(config: decoder.DecoderConfig) -> None:
    """One capture serves a cache for its whole life: reset, another prompt, other lengths."""
    model = make("cuda", config)
    cache, token = prefilled(model)
    decoder.decode(model.step, token, cache, 2)
    step = decoder.capture(model.step, cache)
    for length in (5, 300, 40):
        cache.reset()
        prompt = prompts("cuda", 2, length)
        tokens = decoder.generate(model, prompt, cache, 50, step)
        expected = decoder.generate(model, prompt, model.new_cache(2, cache.max_tokens), 50, model.step)
        assert torch.equal(tokens, expected)


def test_a_captured_step_on_a_side_stream() -> None:
    """Captured and replayed on a side stream, while the default stream is busy."""
    model, side = make("cuda", CONFIG), torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")

    def capture(cache: PagedKVCache) -> decoder.Step:
        static_input, graph = torch.zeros(2, dtype=torch.int64, device="cuda"), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.graph(graph, stream=side):
            static_output = model.step(static_input, cache)
        cache.sync_lengths()

        def replay(token: Tensor, _: PagedKVCache) -> Tensor:
            side.wait_stream(torch.cuda.current_stream())
            torch.mm(busy, busy)
            with torch.cuda.stream(side):
                static_input.copy_(token)
                graph.replay()
            torch.cuda.current_stream().wait_stream(side)
            return static_output

        return replay

    assert_decodes_as_eager(model, capture)


@CONFIGS
def test_reduce_overhead(config: decoder.DecoderConfig) -> None:
    model = make("cuda", config)
    compiled = torch.compile(model.step, fullgraph=True, mode="reduce-overhead")

    def step(token: Tensor, cache: PagedKVCache) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, cache)

    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert_decodes_as_eager(model, lambda _: step)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips


def test_reduce_overhead_is_compiled_once_and_records_once() -> None:
    model = make("cuda", CONFIG)
    step = torch.compile(model.step, fullgraph=True, mode="reduce-overhead")
    cache = model.new_cache(2, 32768)
    token = decoder.prefill(model, prompts("cuda", 2, PROMPT), cache)
    decoder.decode(step, token, cache, 5)  # compiles, warms up, records
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        decoder.decode(step, token, cache, 100)
        assert torch.cuda.max_memory_allocated() - before < cache.k_bounds[0].nbytes


@pytest.mark.parametrize("mode", ["eager", "captured", "compiled"])
def test_right_after_a_matrix_product_on_a_side_stream(mode: str) -> None:
    """An operator on another stream than the product before it would read outdated input."""
    weight = torch.randn(2048, 2048, device="cuda") / 2048**0.5
    config = QuestConfig(32, 16, dense_layers=0)

    def step(x: Tensor, cache: PagedKVCache) -> Tensor:
        for _ in range(20):  # keeps the stream busy for longer than a launch takes
            x = x @ weight
        q, k, v = x[:, :1024].view(2, 1, 8, 128).split((4, 2, 2), 2)
        cache.advance(1)
        return quest_attention(q.contiguous(), k.contiguous(), v.contiguous(), cache, 0, config)

    def fresh() -> PagedKVCache:
        cache = PagedKVCache(1, 2, 128, max_tokens=128, batch_size=2, dtype=torch.float32, device="cuda")
        for pool in cache.pools:
            pool.fill_(0)
        cache.reserve(128)
        return cache

    inputs = torch.randn(60, 2, 2048, device="cuda")
    with torch.no_grad():
        expected_cache, cache = fresh(), fresh()
        expected = []
        for x in inputs:
            expected.append(step(x, expected_cache))
            torch.cuda.synchronize()
        run, static = step, torch.zeros_like(inputs[0])
        if mode == "compiled":
            run = torch.compile(step, fullgraph=True, mode="reduce-overhead")
            run(inputs[0], fresh())  # compiles; the steps below warm up and record
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if mode == "captured":
            with torch.cuda.graph(graph, stream=side):
                out = step(static, cache)
        outs = []
        with torch.cuda.stream(side):
            for x in inputs:
                if mode == "captured":
                    static.copy_(x)
                    graph.replay()
                else:
                    out = run(x, cache)
                outs.append(out.clone())
        torch.cuda.synchronize()
    # Compiled or captured, the product may be another kernel, so bits may differ.
    torch.testing.assert_close(torch.stack(outs), torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert cache.sync_lengths() == [60, 60]
