"""What a QuestCache cannot serve is refused when it is made, or before a step writes anything."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import COMMON, compiled, generate, make_model, passing, prompt, step
from quest_ops import QuestConfig
from quest_ops.transformers import QuestCache, enable_quest
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    LlamaConfig,
    MllamaConfig,
    Qwen3Config,
    T5Config,
)

FULL = QuestConfig(budget=112, dense_layers=0)
NO_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}


def differential_model(device):
    torch.manual_seed(0)
    config = DiffLlamaConfig(**{**NO_HEAD_DIM, "hidden_size": 256})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config.disable_compile = True
    return model


# Attention called more than once for one update


@pytest.mark.parametrize("padding", [(0,), (0, 31)], ids=["one row", "padded"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 32}, {"num_beams": 3}], ids=str)
def test_attention_called_twice_a_step_equals_dense(padding, options, device):
    model, inputs = differential_model(device), prompt(90, device, padding=padding)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    cache = enable_quest(model, FULL, max_tokens=200)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **options), expected)
    rows = len(padding) * options.get("num_beams", 1)
    lens = [97 - count for count in padding for _ in range(options.get("num_beams", 1))]
    for layer in cache.layers:
        assert layer.seq_lens.shape == (rows,)
        assert layer.seq_lens.tolist() == lens
    assert {entry.path for entry in cache.plan()} == {"sparse"}


def test_attention_called_twice_compiles_to_one_graph(device):
    model, inputs = differential_model(device), prompt(90, device, padding=(0, 37))
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    cache = enable_quest(model, FULL, max_tokens=200)
    for graphs in (1, 0):
        counters.clear()
        got = model.generate(**inputs, max_new_tokens=8, do_sample=False, **compiled("eager", device))
        assert torch.equal(got, expected)
        assert counters["stats"].get("unique_graphs", 0) == graphs
        assert not counters["graph_break"]
    assert [layer.columns for layer in cache.layers] == [97] * 3


def test_attention_called_twice_can_be_cropped_and_reset(device):
    model, ids = differential_model(device), prompt(60, device)["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1:]
    cache = enable_quest(model, FULL, max_tokens=200)
    for _ in range(2):
        step(model, ids, cache)
        cache.crop(-1)
        torch.testing.assert_close(step(model, ids[:, -1:], cache), expected, rtol=1e-3, atol=1e-3)
        cache.reset()


def test_a_second_call_that_earlier_steps_lacked_is_an_error(device, monkeypatch):
    model, ids = make_model("qwen3", device), prompt(30, device)["input_ids"]
    cache = enable_quest(model, FULL, max_tokens=64)
    step(model, ids, cache)
    attention = transformers.AttentionInterface()["quest"]

    def twice(*args, **kwargs):
        attention(*args, **kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "quest", twice)
    with pytest.raises(RuntimeError, match=r"called the attention more often.*call cache\.reset\(\)"):
        step(model, ids[:, :1], cache)
    cache.reset()
    step(model, ids, cache)
    assert [layer.seq_lens.tolist() for layer in cache.layers] == [[30]] * 3


def test_keys_of_an_earlier_step_are_an_error(device, monkeypatch):
    model, ids = make_model("qwen3", device), prompt(30, device)["input_ids"]
    cache, kept = enable_quest(model, FULL, max_tokens=64), {}
    attention = transformers.AttentionInterface()["quest"]

    def late(module, query, key, value, *args, **kwargs):
        key, value = kept.setdefault(module.layer_idx, (key, value))
        return attention(module, query[:, :, :30], key, value, *args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "quest", late)
    step(model, ids, cache)
    with pytest.raises(RuntimeError, match="got keys that layer 0 returned in an earlier step"):
        step(model, ids, cache)
    assert [layer.seq_lens.tolist() for layer in cache.layers] == [[30]] * 3


# Refused when the cache is made


def per_layer(head_dim):
    config = Qwen3Config(**COMMON)
    config.per_layer_config = {2: {"head_dim": head_dim}}
    return config


def test_layers_of_several_head_dims_are_named():
    with pytest.raises(ValueError, match="the model's head_dim must be one of 64, 80.*got 512"):
        QuestCache(per_layer(512), FULL, max_tokens=64)


def test_layers_of_several_head_dims_are_allocated_each_by_its_own():
    cache = QuestCache(per_layer(128), FULL, max_tokens=64, batch_size=1)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [64, 64, 128]


def test_an_encoder_decoder_model_is_an_error():
    with pytest.raises(ValueError, match="supports decoder-only models, got T5, which is an encoder-decoder"):
        QuestCache(T5Config(), FULL, max_tokens=64)


def test_cross_attention_is_an_error():
    with pytest.raises(ValueError, match="got Mllama, which has cross-attention layers"):
        QuestCache(MllamaConfig(), FULL, max_tokens=64)
    with pytest.raises(ValueError, match="got Llama, which has cross-attention layers"):
        QuestCache(LlamaConfig(**COMMON, add_cross_attention=True), FULL, max_tokens=64)


def test_multi_head_latent_attention_is_an_error():
    config = DeepseekV3Config(**NO_HEAD_DIM, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=128, kv_lora_rank=32)
    with pytest.raises(
        ValueError, match="got DeepseekV3, whose multi-head latent attention caches a latent of rank 32"
    ):
        QuestCache(config, FULL, max_tokens=64)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_keys_and_values_of_different_head_dim_are_an_error(kind):
    config = Qwen3Config(**COMMON, v_head_dim=128, layer_types=[kind] * 3, use_sliding_window=True, sliding_window=32)
    with pytest.raises(ValueError, match="keys and values of one head_dim, got 64 and 128 in layer 0 of Qwen3"):
        QuestCache(config, FULL, max_tokens=64)


# Messages of a step


@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 9, 3)], ids=["plain", "padded"])
def test_more_rows_than_the_cache_has_are_named(padding, device):
    model = make_model("qwen3", device)
    cache = enable_quest(model, FULL, max_tokens=64, batch_size=2)
    with pytest.raises(ValueError, match="made for a batch of 2, got 3 sequences"):
        generate(model, prompt(40, device, padding=padding), cache)


def test_attention_weights_are_refused(device):
    model, ids = make_model("qwen3", device), prompt(30, device)["input_ids"]
    cache = enable_quest(model, FULL, max_tokens=64)
    for options in ({}, passing(cache)):
        with pytest.raises(ValueError, match="got output_attentions=True"):
            model(ids, output_attentions=True, **options)
    with pytest.raises(ValueError, match="got output_attentions=True"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
    assert int(cache.get_seq_length()) == 0
