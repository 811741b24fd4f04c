"""Compiled decoding by generate(): one graph, no break, no new graph for a second cache, eager mode's tokens."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import compiled, generate, make_model, prompt
from quest_ops import QuestConfig
from quest_ops.transformers import enable_quest
from torch._dynamo.utils import counters

SPARSE = QuestConfig(budget=48, page_size=16, dense_layers=1)


@pytest.mark.parametrize(
    ("name", "backend", "bounds"),
    [
        ("qwen3", "inductor", "cache"),
        ("qwen3", "inductor", "int8"),
        ("gemma3", "aot_eager", "cache"),
        ("gemma2", "eager", "cache"),
        ("gpt-oss", "eager", "cache"),
    ],
)
def test_compiled_decoding_is_one_graph_and_equals_eager(name, backend, bounds, device):
    config = replace(SPARSE, bounds=bounds)
    layers = {"num_hidden_layers": 2} if backend == "inductor" else {}
    model, inputs = make_model(name, device, **layers), prompt(90, device, padding=(0, 37))
    cache = enable_quest(model, config, max_tokens=160)
    model._compiled_call = model._last_compile_config = None
    expected, logits = generate(model, inputs, cache, new=12)
    for graphs in (1, 0):
        counters.clear()
        cache = enable_quest(model, config, max_tokens=160)
        got, compiled_logits = generate(model, inputs, cache, new=12, **compiled(backend, device))
        assert torch.equal(got, expected)
        torch.testing.assert_close(compiled_logits, logits, rtol=1e-3, atol=1e-3)
        assert counters["stats"].get("unique_graphs", 0) == graphs
        assert not counters["graph_break"]
    # The host did not see the lengths move; the next calls must read them.
    assert cache.layers[0].columns == 90 + 11
    turn = {"input_ids": torch.cat([inputs["input_ids"], got, got], 1)}
    turn["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(got), torch.ones_like(got)], 1)
    again, _ = generate(model, turn, cache)
    assert torch.equal(again, generate(model, turn, cache_of_eager(model, inputs, config))[0])


def cache_of_eager(model, inputs, config):
    cache = enable_quest(model, config, max_tokens=160)
    generate(model, inputs, cache, new=12)
    return cache


def test_a_compiled_step_moves_the_lengths_once(device):
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    model, inputs = make_model("qwen3", device), prompt(90, device, padding=(0, 37))
    cache = enable_quest(model, SPARSE, max_tokens=160)
    model._compiled_call = model._last_compile_config = None
    generate(model, inputs, cache, new=4, **compiled(keep, device))
    (graph,) = graphs
    writes = [node for node in graph.graph.nodes if node.target in ("add_", "copy_", "fill_", "zero_")]
    assert len(cache.layers) == 3
    assert len(writes) == 3  # seq_lens, next_lens and cumulative_length


def test_a_cache_that_runs_full_is_an_error_in_compiled_decoding_too(device):
    model, inputs = make_model("qwen3", device), prompt(40, device, padding=(0, 7))
    cache = enable_quest(model, SPARSE, max_tokens=48)
    with pytest.raises(ValueError, match="holds 48 tokens, 48 of them taken, and was given 1 more"):
        generate(model, inputs, cache, new=12, **compiled("eager", device))
