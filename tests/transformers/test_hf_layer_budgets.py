"""A budget for each layer of a Hugging Face model: eager and compiled decoding, the plan, the report and bad lists."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import COMMON, compiled, generate, make_model, prompt, use_reference
from quest_ops import QuestConfig
from quest_ops.transformers import QuestCache, enable_quest
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig

BUDGETS = QuestConfig([48, None, 32], 16, sink_pages=0)
# The first layer of gemma3 has a sliding window, so its budget has no effect.
MIXED = QuestConfig([16, 48, 0], 16, sink_pages=0)


@pytest.mark.parametrize(
    ("name", "config"),
    [("qwen3", BUDGETS), ("gemma3", MIXED), ("qwen3", replace(BUDGETS, candidates=64))],
    ids=["qwen3", "gemma3", "candidates"],
)
def test_each_layer_reads_its_budget_as_the_reference_does(name, config, device):
    model, inputs = make_model(name, device), prompt(90, device, padding=(0, 37))
    use_reference(model, config)
    expected, exact = generate(model, inputs, DynamicCache())
    cache = enable_quest(model, config, max_tokens=128)
    cache.start_report()
    got, logits = generate(model, inputs, cache)
    assert torch.equal(got, expected)
    torch.testing.assert_close(logits, exact, rtol=1e-3, atol=1e-3)
    paths = [entry.path for entry in cache.plan()]
    assert paths == {"qwen3": ["sparse", "dense", "sparse"], "gemma3": ["dense", "sparse", "dense"]}[name]
    read = [entry.pages_read // (2 * 2 * entry.steps) if entry.plan.path == "sparse" else 0 for entry in cache.report()]
    assert read == {"qwen3": [3, 0, 2], "gemma3": [0, 3, 0]}[name]


@pytest.mark.parametrize("backend", ["inductor", "eager"])
@pytest.mark.parametrize("config", [BUDGETS, replace(BUDGETS, candidates=64)], ids=["once", "twice"])
def test_one_compiled_step_serves_all_layers(backend, config, device):
    model, inputs = make_model("qwen3", device), prompt(90, device, padding=(0, 37))
    expected, logits = generate(model, inputs, enable_quest(model, config, max_tokens=160), new=12)
    model._compiled_call = model._last_compile_config = None
    counters.clear()
    cache = enable_quest(model, config, max_tokens=160)
    got, compiled_logits = generate(model, inputs, cache, new=12, **compiled(backend, device))
    assert torch.equal(got, expected)
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_short_rows_of_a_batch_are_dense(backend, device):
    """Rows of 90 and 40 tokens, of which the second is read whole: the tokens of dense attention."""
    model, inputs = make_model("qwen3", device), prompt(90, device, padding=(0, 50))
    dense, dense_logits = generate(model, inputs)
    expected, logits = generate(model, inputs, enable_quest(model, BUDGETS, max_tokens=128))
    assert not torch.allclose(logits[1], dense_logits[1], rtol=1e-3, atol=1e-3)
    options = {} if backend is None else compiled(backend, device)
    cache = enable_quest(model, replace(BUDGETS, dense_below=60), max_tokens=128)
    got, mixed = generate(model, inputs, cache, **options)
    assert torch.equal(got, torch.stack([expected[0], dense[1]]))
    torch.testing.assert_close(mixed, torch.stack([logits[0], dense_logits[1]]), rtol=1e-3, atol=1e-3)
    cache = enable_quest(model, replace(BUDGETS, dense_below=128), max_tokens=128)
    assert cache.plan()[0].reason == "the cache's 128 tokens are within dense_below, 128"


def test_a_loaded_configuration_serves(tmp_path, device):
    model, inputs = make_model("qwen3", device), prompt(90, device)
    expected, _ = generate(model, inputs, enable_quest(model, BUDGETS, max_tokens=128))
    BUDGETS.save(tmp_path / "config.json", model="tiny")
    config = QuestConfig.load(tmp_path / "config.json", model="tiny", num_layers=model.config.num_hidden_layers)
    got, _ = generate(model, inputs, enable_quest(model, config, max_tokens=128))
    assert torch.equal(got, expected)
    other = make_model("qwen3", device, num_hidden_layers=2)
    with pytest.raises(ValueError, match="one for each of 2 layers, got 3 of them"):
        enable_quest(other, config)


def test_the_plan_names_a_budget_of_zero():
    cache = QuestCache(LlamaConfig(**COMMON), BUDGETS, max_tokens=128)
    assert [(entry.path, entry.reason) for entry in cache.plan()] == [
        ("sparse", "reads at most 48 of 128 tokens"),
        ("dense", "a budget of 0"),
        ("sparse", "reads at most 32 of 128 tokens"),
    ]


def test_a_list_for_another_number_of_layers_is_an_error(device):
    config, message = QuestConfig([64] * 4), r"config.budget must be .* one for each of 3 layers, got 4 of them"
    with pytest.raises(ValueError, match=message):
        QuestCache(LlamaConfig(**COMMON), config, max_tokens=64)
    model = make_model("qwen3", device)
    with pytest.raises(ValueError, match=message):
        enable_quest(model, config)
    assert model.config._attn_implementation == "sdpa"
    cache = QuestCache(LlamaConfig(**COMMON), max_tokens=64)
    with pytest.raises(ValueError, match=message):
        cache.quest_config = config
    cache.quest_config = BUDGETS
    with pytest.raises(ValueError, match="candidates of a cache made without them must be 0, got 64"):
        cache.quest_config = replace(BUDGETS, candidates=64)
    cache = QuestCache(LlamaConfig(**COMMON), replace(BUDGETS, candidates=64), max_tokens=64)
    for config in (BUDGETS, replace(BUDGETS, candidates=128)):
        cache.quest_config = config
    assert cache.quest_config.at(2).num_pages == 2
