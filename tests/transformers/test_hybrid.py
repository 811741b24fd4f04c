"""Hybrid models: their attention is sparse, and the states beside it are transformers' own."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import generate, passing, prompt, step
from helpers.tiny_models import tiny_model
from quest_ops import QuestConfig
from quest_ops.transformers import QuestCache, enable_quest
from transformers import DynamicCache, LlamaConfig, MambaConfig

FULL = QuestConfig(budget=112, dense_layers=0)
SMALL = QuestConfig(budget=16, sink_pages=0, dense_layers=0)
# States beside attention in other layers, or in the same: the paths of the layers.
PATHS = {
    "qwen3_next": ["none", "none", "none", "sparse"],
    "jamba": ["none", "sparse", "none", "sparse"],
    "lfm2": ["none", "sparse", "none", "sparse"],
    "nemotron_h": ["none", "none", "sparse", "none"],
    "falcon_h1": ["sparse"] * 4,
    "zamba2": ["none", "sparse", "none", "sparse"],
    "zaya": ["dense", "sparse", "dense", "sparse"],
}
FAMILIES = pytest.mark.parametrize("name", PATHS)


def dense(name, inputs, device):
    model = tiny_model(name).to(device)
    return model, generate(model, inputs, DynamicCache(config=model.config))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@FAMILIES
@pytest.mark.parametrize("padding", [(0,), (0, 37)], ids=["one row", "padded"])
def test_a_full_budget_equals_dense_with_the_models_own_cache(name, padding, device):
    inputs = prompt(90, device, padding=padding)
    model, (expected, logits) = dense(name, inputs, device)
    cache = enable_quest(model, FULL, max_tokens=200)
    assert [layer.path for layer in cache.plan()] == PATHS[name]
    got, sparse_logits = generate(model, inputs, cache)
    assert torch.equal(got, expected)
    close(sparse_logits, logits)


@FAMILIES
def test_a_small_budget_reads_fewer_pages(name, device):
    inputs = prompt(90, device)
    model, (_, logits) = dense(name, inputs, device)
    cache = enable_quest(model, SMALL, max_tokens=200)
    cache.start_report()
    _, sparse_logits = generate(model, inputs, cache)
    close(sparse_logits[:, 0], logits[:, 0])
    for layer in cache.report():
        assert (0 < layer.pages_read < layer.pages_held) == (layer.plan.path == "sparse")
    if "sparse" in PATHS[name]:
        assert (sparse_logits[:, 1] - logits[:, 1]).abs().max() > 1e-3, "the budget must matter, or this shows nothing"


@FAMILIES
def test_a_cache_is_ready_again_after_reset(name, device):
    model, inputs = tiny_model(name).to(device), prompt(60, device, padding=(0, 11))
    cache = enable_quest(model, SMALL, max_tokens=100)
    expected = generate(model, inputs, cache)
    cache.reset()
    generate(model, prompt(30, device, seed=4, padding=(3, 0)), cache)
    cache.reset()
    got = generate(model, inputs, cache)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_beams_carry_their_states(name, device):
    model, inputs = tiny_model(name).to(device), prompt(50, device, padding=(0, 9))
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**inputs, **options)
    cache = enable_quest(model, FULL, max_tokens=64)
    assert torch.equal(model.generate(**inputs, **passing(cache), **options), expected)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_a_cache_of_a_hybrid_model_can_be_allocated_first(name, device):
    model, inputs = tiny_model(name).to(device), prompt(60, device, padding=(0, 11))
    expected, _ = generate(model, inputs, enable_quest(model, SMALL, max_tokens=100))
    cache = enable_quest(model, SMALL, max_tokens=100, batch_size=2)
    assert cache.is_initialized
    assert torch.equal(generate(model, inputs, cache)[0], expected)


def test_a_recurrent_state_does_not_go_back_and_nothing_else_does(device):
    model, ids = tiny_model("qwen3_next").to(device), prompt(40, device)["input_ids"]
    cache = enable_quest(model, SMALL, max_tokens=64)
    step(model, ids, cache)
    twin = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="cannot be cropped: the recurrent state of layer 0 does not go back"):
        cache.crop(-3)
    token = ids[:, :1]
    assert torch.equal(step(model, token, cache), step(model, token, twin))


def test_an_unrecorded_convolution_state_does_not_go_back(device):
    model, ids = tiny_model("lfm2").to(device), prompt(40, device)["input_ids"]
    cache = enable_quest(model, SMALL, max_tokens=64)
    step(model, ids, cache)
    with pytest.raises(ValueError, match=r"layer 0 goes back only if it was recorded: call cache.activate_past_rec"):
        cache.crop(-3)
    assert cache.layers[1].columns == 40


def test_a_recorded_convolution_state_goes_back(device):
    model, ids = tiny_model("lfm2").to(device), prompt(40, device)["input_ids"]
    cache = enable_quest(model, SMALL, max_tokens=64)
    step(model, ids, cache)
    expected = step(model, ids[:, :1], copy.deepcopy(cache))
    cache.activate_past_recording()
    step(model, ids[:, 5:8], cache)
    cache.crop(-3)
    close(step(model, ids[:, :1], cache), expected)


def test_the_plan_says_which_layers_keep_no_keys():
    plan = enable_quest(tiny_model("qwen3_next"), SMALL, max_tokens=64).plan()
    assert plan[0] == (0, "none", "no attention; any state, of a fixed size, is transformers' own")
    assert plan[3] == (3, "sparse", "reads at most 16 of 64 tokens")


# Refused when the cache is made


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match="serves layers of attention, and Mamba has none"):
        QuestCache(MambaConfig(num_hidden_layers=2), max_tokens=64)


def test_unknown_kinds_of_layers_are_refused():
    config = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"])
    config.attention_chunk_size = 16
    with pytest.raises(ValueError, match="got chunked_attention in layer 1"):
        QuestCache(config, max_tokens=64)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jetmoe", "layer 0 stored 0 tokens in a step of 9"),
        ("moshi", "a sliding window of 32 tokens, and its attention has none"),
        ("minimax", "MiniMax uses cache of its own"),
    ],
)
def test_a_trial_refuses_models_that_use_their_cache_otherwise(name, reason):
    with pytest.raises(ValueError, match=reason):
        enable_quest(tiny_model(name), SMALL, max_tokens=64)


def test_a_trial_leaves_the_model_as_it_was(device):
    model = tiny_model("qwen3_next").to(device).train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    cache = enable_quest(model, SMALL, max_tokens=64)
    assert [module.training for module in model.modules()] == modes
    assert int(cache.get_seq_length()) == 0
    assert not cache.is_initialized
