"""The example's decoder: equal to one without a cache, compiled once for all lengths, without copies."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from helpers.decoder_example import (
    CONFIGS,
    DENSE,
    Decoder,
    DecoderConfig,
    assert_same_cache,
    decoder,
    filled,
    generate,
    make,
    prefill,
    prompts,
)
from quest_ops import PagedKVCache
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention


@torch.no_grad()
def logits_without_a_cache(model: Decoder, tokens: Tensor) -> Tensor:
    """A decoder with the same weights and no cache: logits [B, T, vocab]."""
    x = model.embedding(tokens)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    half = torch.arange(0, model.config.head_dim, 2, device=tokens.device) / model.config.head_dim
    angle = torch.polar(torch.ones(()).to(half), position[:, None] / model.config.rope_theta**half)

    def rotated(x: Tensor) -> Tensor:  # as complex numbers, [B, T, H, D]
        pairs = torch.complex(*x.chunk(2, -1)) * angle[:, None]
        return torch.cat((pairs.real, pairs.imag), -1)

    for layer in model.layers:
        part, y = layer.attention, layer.attention_norm(x)
        q, k, v = (project(y).unflatten(-1, (-1, 64)) for project in (part.q_proj, part.k_proj, part.v_proj))
        q, k, v = (z.transpose(1, 2) for z in (rotated(q), rotated(k), v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + part.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    return model.output(model.norm(x))


@pytest.mark.parametrize("chunk", [1024, 32, 7], ids=["whole", "chunks", "tiny_chunks"])
def test_with_a_budget_for_all_it_is_a_plain_decoder(device: str, chunk: int) -> None:
    model, prompt = make(device, DENSE), prompts(device, 2, 61)
    cache = model.new_cache(2, 128)
    tokens = [prefill(model, prompt, cache, chunk)]
    with torch.no_grad():
        for _ in range(20):
            tokens.append(model.step(tokens[-1], cache))
    whole = torch.cat((prompt, torch.stack(tokens, 1)), 1)
    assert torch.equal(logits_without_a_cache(model, whole)[:, 60:-1].argmax(-1), whole[:, 61:])


def test_a_prompt_in_chunks_is_read_densely_to_its_end(device: str) -> None:
    """101 tokens in chunks of 10 would leave a single token, which is a sparse decode step; even chunks do not."""
    model, prompt = make(device), prompts(device, 2, 101)
    first = [prefill(model, prompt, model.new_cache(2, 128), chunk) for chunk in (1024, 20, 10)]
    dense = logits_without_a_cache(model, prompt)[:, -1].argmax(-1)
    assert all(torch.equal(token, dense) for token in first)


def test_generate_leaves_the_cache_as_it_says(device: str) -> None:
    model = make(device)
    cache = model.new_cache(2, 128)
    tokens = generate(model, prompts(device, 2, 50), cache, 30, model.step)
    assert tokens.shape == (2, 30)
    assert cache.lengths == [79, 79]  # the last token was not stored
    cache.reset()
    assert torch.equal(generate(model, prompts(device, 2, 50), cache, 30, model.step), tokens)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@CONFIGS
def test_one_compilation_serves_every_length_and_one_more_every_batch(
    device: str, backend: str, config: DecoderConfig
) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, counter = make(device, config), CompileCounterWithBackend(backend)
    step = torch.compile(model.step, fullgraph=True, backend=counter)

    def check(batch: int, prompt: int, tokens: int) -> None:
        caches = [filled(model, batch, prompt) for _ in range(2)]
        outs = [decoder.decode(s, *caches[i][::-1], tokens) for i, s in enumerate((model.step, step))]
        assert torch.equal(*outs)
        assert_same_cache(caches[1][0], caches[0][0])

    check(2, 5, 251)  # from one page to the full capacity, past the budget of two pages
    assert counter.frame_count == 1
    check(2, 100, 20)
    assert counter.frame_count == 1
    check(3, 40, 20)
    assert counter.frame_count <= 2
    check(3, 5, 60)
    assert counter.frame_count <= 2
    assert not counters["graph_break"]


@CONFIGS
def test_with_all_sizes_symbolic_each_layer_still_has_its_place(device: str, config: DecoderConfig) -> None:
    """With a symbolic number of pages too, Inductor would let every layer write into the first."""
    torch._dynamo.reset()
    model = make(device, config)
    step = torch.compile(model.step, fullgraph=True, dynamic=True)
    caches = [filled(model, 3) for _ in range(2)]
    outs = [decoder.decode(s, *caches[i][::-1], 5) for i, s in enumerate((model.step, step))]
    assert torch.equal(*outs)
    assert_same_cache(caches[1][0], caches[0][0])


def test_batches_over_one_pool_share_a_compilation(device: str) -> None:
    """With one pool size, all batch sizes from the second on run the same code."""
    torch._dynamo.reset()
    model, counter = make(device), CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.step, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 4):
        runs = []
        for run in (model.step, step):
            cache = PagedKVCache(
                2, 2, 64, max_tokens=128, batch_size=batch, num_pages=40, dtype=torch.float32, device=device
            )
            runs.append(generate(model, prompts(device, batch, 40), cache, 10, run))
        assert torch.equal(*runs)
    assert counter.frame_count <= 2


@CONFIGS
def test_the_compiled_step_copies_no_cache(device: str, config: DecoderConfig) -> None:
    torch._dynamo.reset()
    model = make(device, config)
    cache, token = filled(model, 2)
    expected, _ = filled(model, 2)
    cache.reserve(1)
    with torch.no_grad():
        out, (code, *_) = run_and_get_code(torch.compile(model.step, fullgraph=True), token, cache)
        assert torch.equal(out, model.step(token, expected))
    cache.sync_lengths()
    assert_same_cache(cache, expected)
    assert [len(re.findall(rf"{name}\.default\(", code)) for name in ("append_kv", "decode_step")] == [0, 2]
    # A layer's bounds are the smallest tensor of the cache; compiled code allocates far less.
    sizes = [eval(size) for size in re.findall(r"empty_strided\w*\((\([\d, ]*\))", code)]
    assert sizes
    assert max(math.prod(size) for size in sizes) < cache.k_bounds[0].numel() / 4
    assert "ops.aten.clone" not in code


@pytest.mark.gpu
def test_the_compiled_step_needs_no_memory_of_the_caches_size() -> None:
    torch._dynamo.reset()
    model = make("cuda")
    cache, token = filled(model, 2, capacity=65536)
    step = torch.compile(model.step, fullgraph=True)
    decoder.decode(step, token, cache, 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder.decode(step, token, cache, 3)
    assert torch.cuda.max_memory_allocated() - before < cache.k_bounds[0].nbytes


def test_the_example_runs(device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    graph = ["--graph"] if device == "cuda" else []
    monkeypatch.setattr(sys, "argv", ["decoder.py", "--device", device, "--prompt", "300", "--tokens", "6", *graph])
    decoder.main()
    printed = capsys.readouterr().out
    for name in ("compiled", "graph") if graph else ("compiled",):
        assert f"{name} == eager: True (12 of 12 tokens)" in printed
