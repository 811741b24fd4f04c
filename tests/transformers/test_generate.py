"""Generation after enable_quest alone: no cache in the call, prompts that a cache refuses, caches that models drop."""

import copy
import gc
from types import MethodType

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import COMMON, compiled, generate, make_model, new_model, prompt, step
from quest_ops import QuestConfig
from quest_ops.transformers import QuestCache, disable_quest, enable_quest
from quest_ops.transformers.generation import CACHE_NAME
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Phi3Config,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    PhimoeConfig,
)

FULL = QuestConfig(budget=112, dense_layers=0)
SPARSE = QuestConfig(budget=32, sink_pages=0, dense_layers=1)


@pytest.fixture(autouse=True)
def _models_are_left_as_they_were(device):
    yield
    for name in ("qwen3", "gemma3"):
        model = make_model(name, device)
        if "generate" in vars(model):
            disable_quest(model)


def tokens(model, inputs, **options):
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(**inputs, **options)


def held_bytes():
    gc.collect()
    return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_serve_without_a_deprecation(name, device, recwarn):
    """Whatever transformers is installed: it calls the argument past_key_values before 5.24, and drops that in 6.0."""
    model, inputs = make_model("qwen3", device), prompt(90, device, padding=(0, 5))
    expected = tokens(model, inputs)
    cache = enable_quest(model, FULL, max_tokens=128)
    assert torch.equal(tokens(model, inputs, **{name: cache}), expected)
    assert cache.get_seq_length() == 97
    assert not [str(w.message) for w in recwarn if "deprecated" in str(w.message)]
    with pytest.raises(ValueError, match="which a prompt of 90 does not continue"):
        tokens(model, inputs, **{name: cache})


# Without a cache in the call


@pytest.mark.parametrize("max_tokens", [None, 200])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_generate_makes_its_own_cache(name, max_tokens, device):
    model, inputs = make_model(name, device), prompt(150, device, padding=(0, 53))
    long = max_tokens or 157
    expected, logits = generate(model, inputs, enable_quest(model, SPARSE, max_tokens=long))
    cache = enable_quest(model, SPARSE, max_tokens=max_tokens)
    cache.start_report()
    got, own_logits = generate(model, inputs)
    assert torch.equal(got, expected)
    assert torch.equal(own_logits, logits)
    assert [entry.path for entry in cache.plan()][-1] == "sparse"
    assert cache.layers[-1].max_cache_len == -(-long // 16) * 16
    assert all(layer.steps == 7 for layer in cache.report())


def test_each_call_starts_anew_and_keeps_the_memory(device):
    model = make_model("qwen3", device)
    prompts = [prompt(n, device, seed=n, padding=(0, 5)) for n in (90, 40, 90, 70)]
    expected = [tokens(model, inputs) for inputs in prompts]
    cache = enable_quest(model, FULL)
    for inputs, want in zip(prompts[:1], expected[:1], strict=True):
        assert torch.equal(tokens(model, inputs), want)
    addresses, before = [layer.keys.data_ptr() for layer in cache.layers], held_bytes()
    for inputs, want in zip(prompts, expected, strict=True):
        assert torch.equal(tokens(model, inputs), want)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    assert held_bytes() == before


def test_a_longer_call_or_another_batch_makes_room(device):
    model = make_model("gemma3", device)
    calls = [prompt(40, device), prompt(120, device), prompt(60, device, padding=(0, 9, 3))]
    expected = [tokens(model, inputs) for inputs in calls]
    cache = enable_quest(model, QuestConfig(budget=512, dense_layers=0))
    rooms = []
    for inputs, want in zip(calls, expected, strict=True):
        assert torch.equal(tokens(model, inputs), want)
        rooms.append((cache.layers[-1].batch_size, cache.layers[-1].max_cache_len))
    assert rooms == [(1, 48), (1, 128), (3, 80)]


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"prefill_chunk_size": 16}],
)
def test_other_ways_to_generate_need_no_cache_either(options, device):
    model, inputs = make_model("gemma3", device), prompt(50, device, padding=(0, 9))
    expected = tokens(model, inputs, **options)
    cache = enable_quest(model, FULL, max_tokens=64)
    assert torch.equal(tokens(model, inputs, **options), expected)
    assert int(cache.get_seq_length()) == 57


def test_compiled_decoding_needs_no_cache_either(device):
    model, inputs = make_model("gemma3", device), prompt(90, device, padding=(0, 37))
    expected = tokens(model, inputs)
    enable_quest(model, FULL, max_tokens=200)
    model._compiled_call = model._last_compile_config = None
    for graphs in (1, 0):
        counters.clear()
        assert torch.equal(tokens(model, inputs, **compiled("eager", device)), expected)
        assert counters["stats"].get("unique_graphs", 0) == graphs
        assert not counters["graph_break"]


def test_assisted_decoding_needs_no_cache_either(device):
    model, assistant = make_model("gemma3", device), make_model("qwen3", device, intermediate_size=64)
    inputs = prompt(50, device)
    expected = tokens(model, inputs, max_new_tokens=16)
    cache = enable_quest(model, FULL)
    assert torch.equal(tokens(model, inputs, assistant_model=assistant, max_new_tokens=16), expected)
    assert int(cache.get_seq_length()) >= 64


def test_a_handle_that_is_let_go_takes_nothing_away(device):
    model, inputs = make_model("qwen3", device), prompt(50, device)
    expected = tokens(model, inputs)
    enable_quest(model, FULL)
    assert torch.equal(tokens(model, inputs), expected)
    assert torch.equal(tokens(model, inputs), expected)


def test_a_call_that_asks_for_another_cache_gets_it(device):
    model, inputs = make_model("qwen3", device), prompt(50, device)
    expected = tokens(model, inputs)
    cache = enable_quest(model, FULL, max_tokens=64)
    plan = cache.plan()
    tokens(model, inputs)
    cache.reset()
    for options in ({"use_cache": False}, {"cache_implementation": "static"}, {CACHE_NAME: DynamicCache()}):
        assert torch.equal(tokens(model, inputs, **options), expected)
    assert int(cache.get_seq_length()) == 0
    assert cache.plan() == plan


def test_disable_quest_leaves_the_model_as_it_was(device):
    model, inputs = new_model("qwen3", device), prompt(50, device)
    before, implementation = set(vars(model)), model.config._attn_implementation
    expected = tokens(model, inputs)
    enable_quest(model, FULL)
    enable_quest(model, SPARSE)
    disable_quest(model)
    assert set(vars(model)) == before
    assert model.config._attn_implementation == implementation
    assert torch.equal(tokens(model, inputs), expected)
    with pytest.raises(ValueError, match="this Qwen3ForCausalLM is not under enable_quest"):
        disable_quest(model)


def test_a_copied_model_has_a_cache_of_its_own(device):
    model, inputs = make_model("qwen3", device), prompt(50, device)
    cache = enable_quest(model, FULL, max_tokens=64)
    twin = copy.deepcopy(model)
    assert isinstance(twin.generate, MethodType)
    assert twin.generate.__self__ is twin
    tokens(twin, inputs)
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(tokens(model, inputs), tokens(twin, inputs))


# A cache that holds tokens


def test_a_prompt_that_does_not_continue_the_cache_is_an_error(device):
    model = make_model("qwen3", device)
    cache = enable_quest(model, FULL, max_tokens=256)
    first = prompt(50, device)
    tokens(model, first, **{CACHE_NAME: cache})
    for length in (20, 57):
        with pytest.raises(ValueError, match=f"holds 57 tokens, which a prompt of {length} does not continue"):
            tokens(model, prompt(length, device, seed=2), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="holds 57 tokens of another prompt: call cache.reset"):
        tokens(model, prompt(90, device, seed=2), **{CACHE_NAME: cache})
    cache.reset()
    other = prompt(90, device, seed=2)
    got = tokens(model, other, **{CACHE_NAME: cache})
    disable_quest(model)
    assert torch.equal(got, tokens(model, other))


def test_a_prompt_that_continues_the_cache_goes_on(device):
    model, inputs = make_model("qwen3", device), prompt(50, device, padding=(0, 9))
    more = prompt(20, device, seed=3, padding=(0, 0))["input_ids"]
    cache = enable_quest(model, FULL, max_tokens=256)
    first = tokens(model, inputs, **{CACHE_NAME: cache})
    cache.crop(-3)
    whole = {"input_ids": torch.cat([first, more], 1)}
    whole["attention_mask"] = torch.cat(
        [inputs["attention_mask"], whole["input_ids"].new_ones(2, whole["input_ids"].shape[1] - 50)], 1
    )
    got = tokens(model, whole, **{CACHE_NAME: cache})
    disable_quest(model)
    assert torch.equal(got, tokens(model, whole))


def test_new_tokens_alone_go_on_under_a_whole_mask(device):
    model, inputs = make_model("qwen3", device), prompt(50, device)
    cache = enable_quest(model, FULL, max_tokens=256)
    step(model, inputs["input_ids"], cache)
    more = prompt(20, device, seed=3)["input_ids"]
    mask = torch.ones(1, 70, dtype=torch.int64, device=device)
    got = tokens(model, {"input_ids": more, "attention_mask": mask}, **{CACHE_NAME: cache})
    whole = torch.cat([inputs["input_ids"], more], 1)
    disable_quest(model)
    assert torch.equal(got[:, 20:], tokens(model, {"input_ids": whole, "attention_mask": mask})[:, 70:])


# Models that drop or replace the cache

LONG_ROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
    "hidden_size": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [1.5] * 32,
        "short_factor": [1.0] * 32,
        "long_mscale": 1.2,
        "short_mscale": 1.1,
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    },
}


ENCODER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
SMALL_ENCODERS = {
    "vision_config": {**ENCODER, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14, "crop_size": 28},
    "audio_config": {**ENCODER, "num_blocks": 1, "nemo_conv_channels": 32, "ext_pw_out_channel": 32},
}


def long_rope_model(name, device):
    sizes = {key: value for key, value in COMMON.items() if key != "head_dim"}
    sizes.update(LONG_ROPE)
    torch.manual_seed(0)
    if name == "phi4 multimodal":
        rope = {**LONG_ROPE["rope_parameters"], "partial_rotary_factor": 1.0}
        config = Phi4MultimodalConfig(**{**sizes, "rope_parameters": rope}, **SMALL_ENCODERS)
        model = Phi4MultimodalForCausalLM(config).float().to(device).eval()
    else:
        config = {"phi3": Phi3Config, "phimoe": PhimoeConfig}[name](**sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config.disable_compile = True
    return model


@pytest.mark.parametrize("name", ["phi3", "phimoe", "phi4 multimodal"])
@pytest.mark.parametrize("length", [40, 60, 90])
@pytest.mark.parametrize("passed", [False, True])
def test_longrope_keeps_the_quest_cache_past_the_original_context(name, length, passed, device):
    """From 60 tokens generation crosses the original context of 64.

    Dense generation with a cache is wrong there before transformers 5.24: it drops the cache, and goes on with the last
    token alone.
    """
    model, inputs = long_rope_model(name, device), prompt(length, device, padding=(0, 7))
    expected = tokens(model, inputs, max_new_tokens=10, use_cache=False)
    cache = enable_quest(model, FULL, max_tokens=200)
    cache.start_report()
    options = {CACHE_NAME: cache} if passed else {}
    assert torch.equal(tokens(model, inputs, max_new_tokens=10, **options), expected)
    assert int(cache.get_seq_length()) == length + 9
    assert {entry.path for entry in cache.plan()} == {"sparse"}
    switched = 1 if length == 60 else 0
    assert all(layer.steps == 9 - switched and layer.prefills == 1 + switched for layer in cache.report())


def test_a_plan_says_that_the_model_replaced_the_cache(device):
    model, inputs = copy.deepcopy(make_model("qwen3", device)), prompt(50, device)
    expected = tokens(model, inputs)
    original = type(model).forward

    class Replacing(type(model)):
        def forward(self, input_ids=None, **kwargs):
            if isinstance(kwargs.get(CACHE_NAME), QuestCache):
                kwargs[CACHE_NAME] = DynamicCache(config=self.config)
            return original(self, input_ids, **kwargs)

    cache = enable_quest(model, FULL, max_tokens=200)  # tries the model, and would refuse it then
    model.__class__ = Replacing
    assert torch.equal(tokens(model, inputs, **{CACHE_NAME: cache}), expected)
    assert {entry[1:] for entry in cache.plan()} == {("dense", "the model replaced this cache by DynamicCache")}
    cache.reset()
    assert cache.plan()[0].path == "sparse"
