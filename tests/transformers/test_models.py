"""Hugging Face models in all ways to generate: a full budget equals dense, a smaller one equals the reference."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import MODELS, generate, make_model, passing, prompt, step, use_reference
from quest_ops import QuestConfig
from quest_ops.transformers import QuestCache, _say, enable_quest
from quest_ops.transformers.generation import CACHE_NAME
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SPARSE = QuestConfig(budget=48, page_size=16, dense_layers=1)
FULL = QuestConfig(budget=512, dense_layers=0)
PLAIN = ("llama", "qwen2", "qwen3", "mistral")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def said(caplog):
    """The messages that quest_ops logged, none of them suppressed as a repetition."""
    _say._said.clear()
    caplog.set_level(logging.INFO, "quest_ops")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "quest_ops"]


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_that_holds_everything_equals_dense_generate(name, device):
    model = make_model(name, device)
    for inputs in (prompt(1, device), prompt(5, device), prompt(90, device), prompt(90, device, padding=(0, 7, 71))):
        model = make_model(name, device)
        expected, logits = generate(model, inputs)
        got, sparse_logits = generate(model, inputs, enable_quest(model, FULL, max_tokens=100))
        assert torch.equal(got, expected)
        close(sparse_logits, logits)


@pytest.mark.parametrize("name", [*PLAIN, "gemma3", "gpt-oss"])
@pytest.mark.parametrize("bounds", ["cache", "int8", "int4"])
def test_a_sparse_layer_within_the_budget_equals_dense_generate(name, bounds, device):
    """The cache is larger than the budget, so layers are sparse, but its contents are not."""
    model, inputs = make_model(name, device), prompt(90, device, padding=(0, 37))
    expected, logits = generate(model, inputs)
    config = QuestConfig(budget=112, dense_layers=0, bounds=bounds)
    cache = enable_quest(model, config, max_tokens=200)
    assert any(entry.path == "sparse" for entry in cache.plan())
    got, sparse_logits = generate(model, inputs, cache)
    assert torch.equal(got, expected)
    close(sparse_logits, logits)
    all_dense = enable_quest(model, replace(config, dense_layers=3), max_tokens=200)
    assert torch.equal(generate(model, inputs, all_dense)[1], sparse_logits)


@pytest.mark.parametrize("name", [*PLAIN, "gemma3", "gpt-oss"])
@pytest.mark.parametrize("padding", [(0,), (0, 53)], ids=["one row", "padded"])
@pytest.mark.parametrize("bounds", ["cache", "int8", "int4"])
def test_less_equals_the_reference(name, padding, bounds, device):
    model, inputs = make_model(name, device), prompt(150, device, padding=padding)
    config = QuestConfig(budget=32, page_size=16, sink_pages=1, dense_layers=1, bounds=bounds)
    _, dense = generate(model, inputs, new=6)
    use_reference(model, config)
    expected, logits = generate(model, inputs, DynamicCache(config=model.config), new=6)
    got, sparse_logits = generate(model, inputs, enable_quest(model, config, max_tokens=200), new=6)
    assert torch.equal(got, expected)
    close(sparse_logits, logits)
    close(sparse_logits[:, 0], dense[:, 0])
    assert (sparse_logits[:, 1] - dense[:, 1]).abs().max() > 1e-2, "the budget must matter, or the test shows nothing"


@pytest.mark.parametrize("reduce", ["none", "sum", "soft"])
def test_the_groups_way_of_selecting_is_the_references(reduce, device):
    model, inputs = make_model("llama", device), prompt(150, device)
    config = QuestConfig(budget=32, page_size=8, sink_pages=0, dense_layers=0, group_reduce=reduce)
    use_reference(model, config)
    expected, logits = generate(model, inputs, DynamicCache(config=model.config), new=4)
    got, sparse_logits = generate(model, inputs, enable_quest(model, config, max_tokens=160), new=4)
    assert torch.equal(got, expected)
    close(sparse_logits, logits)


# Padding


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_padding_changes_nothing_under_any_budget(name, device):
    model, config = make_model(name, device), QuestConfig(budget=16, sink_pages=0, dense_layers=0)
    batch = prompt(130, device, padding=(0, 5, 83))
    together, logits = generate(model, batch, enable_quest(model, config, max_tokens=140))
    for row, count in enumerate((0, 5, 83)):
        alone = {key: tensor[row : row + 1, count:] for key, tensor in batch.items()}
        got, its_logits = generate(model, alone, enable_quest(model, config, max_tokens=140))
        assert torch.equal(got[0], together[row])
        close(its_logits[0], logits[row])


def test_rows_may_be_padded_anew_in_each_turn(device):
    model = make_model("qwen3", device)
    first, second = prompt(60, device, padding=(0, 20)), prompt(30, device, seed=2, padding=(11, 0))
    inputs = {key: torch.cat([first[key], second[key]], 1) for key in first}
    expected, logits = generate(model, inputs)
    cache = enable_quest(model, FULL, max_tokens=110)
    positions = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
    step(model, first["input_ids"], cache, attention_mask=first["attention_mask"], position_ids=positions)
    got, sparse_logits = generate(model, inputs, cache)
    assert torch.equal(got, expected)
    close(sparse_logits, logits)


def test_a_step_may_leave_rows_as_they_are(device):
    model = make_model("qwen3", device)
    inputs, ids = prompt(40, device, padding=(0, 0)), prompt(1, device, seed=3, padding=(0, 0))["input_ids"]
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, inputs["input_ids"], cache)
    ones = torch.ones(2, 41, dtype=torch.int64, device=device)
    ones[1, 40] = 0  # the second row has ended
    step(model, ids, cache, attention_mask=ones)
    assert [layer.seq_lens.tolist() for layer in cache.layers] == [[41, 40]] * 3
    # The row continues as if that step had not happened.
    ones = torch.cat([ones, torch.ones_like(ones[:, :1])], 1)
    got = step(model, ids, cache, attention_mask=ones, position_ids=torch.tensor([[41], [40]], device=device))
    other = enable_quest(model, SPARSE, max_tokens=64)
    step(model, inputs["input_ids"], other)
    assert torch.equal(got[1], step(model, ids, other)[1])


# Ways to generate


def test_sampling_draws_what_dense_sampling_draws(device):
    model, inputs = make_model("qwen3", device), prompt(40, device, padding=(0, 9))
    options = {"do_sample": True, "top_k": 5, "num_return_sequences": 2}
    torch.manual_seed(3)
    expected = model.generate(**inputs, max_new_tokens=8, **options)
    torch.manual_seed(3)
    cache = enable_quest(model, FULL, max_tokens=64)
    assert torch.equal(model.generate(**inputs, **passing(cache), max_new_tokens=8, **options), expected)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_beam_search_equals_dense_beam_search(name, device):
    model, inputs = make_model(name, device), prompt(50, device, padding=(0, 9))
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**inputs, **options)
    cache = enable_quest(model, FULL, max_tokens=64)
    assert torch.equal(model.generate(**inputs, **passing(cache), **options), expected)


@pytest.mark.parametrize("bounds", ["cache", "int8", "int4"])
def test_reordered_rows_carry_their_pages_bounds_and_lengths(bounds, device):
    model, inputs = make_model("gemma3", device), prompt(70, device, padding=(0, 9, 30))
    cache = enable_quest(model, replace(SPARSE, bounds=bounds), max_tokens=96)
    step(model, inputs["input_ids"], cache, attention_mask=inputs["attention_mask"])
    twin, rows = copy.deepcopy(cache), torch.tensor([2, 0, 2], device=device)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reorder_cache(rows)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    ids = torch.tensor([[5], [6], [5]], device=device)
    expected = step(model, torch.tensor([[6], [7], [5]], device=device), twin)
    assert torch.equal(step(model, ids, cache), expected[rows])


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("drafted", [3, 20])
def test_assisted_decoding_equals_dense_greedy(name, drafted, device):
    model, assistant = make_model(name, device), make_model("qwen3", device, intermediate_size=64)
    inputs = prompt(50, device)
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    cache = enable_quest(model, FULL, max_tokens=128)
    assistant.generation_config.num_assistant_tokens = drafted
    got = model.generate(**inputs, **passing(cache), assistant_model=assistant, max_new_tokens=16, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("chunk", [9, 64])
def test_a_prefill_in_chunks_equals_a_whole_one(name, chunk, device):
    model, inputs = make_model(name, device), prompt(90, device, padding=(0, 70))
    expected, logits = generate(model, inputs, enable_quest(model, SPARSE, max_tokens=100))
    cache = enable_quest(model, SPARSE, max_tokens=100, batch_size=2)
    got, chunked_logits = generate(model, inputs, cache, prefill_chunk_size=chunk)
    assert torch.equal(got, expected)
    close(chunked_logits, logits)


def test_a_second_turn_goes_on_where_the_first_ended(device):
    model, inputs = make_model("gemma3", device), prompt(60, device, padding=(0, 20))
    cache = enable_quest(model, FULL, max_tokens=128)
    first, _ = generate(model, inputs, cache)
    more = prompt(40, device, seed=5, padding=(0, 0))
    ids = torch.cat([inputs["input_ids"], first, more["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(first), more["attention_mask"]], 1)
    second = {"input_ids": ids, "attention_mask": mask}
    got, _ = generate(model, second, cache)
    expected, _ = generate(make_model("gemma3", device), second)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_is_ready_again_after_reset(name, device):
    model, inputs = make_model(name, device), prompt(80, device, padding=(0, 11))
    cache = enable_quest(model, SPARSE, max_tokens=100)
    expected = generate(model, inputs, cache)
    cache.reset()
    generate(model, prompt(30, device, seed=4, padding=(3, 0)), cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    got = generate(model, inputs, cache)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_several_tokens_decode_as_one_by_one(device):
    model, ids = make_model("gemma3", device), prompt(160, device)["input_ids"]
    cache = enable_quest(model, SPARSE, max_tokens=200)
    step(model, ids, cache)
    more = prompt(8, device, seed=2)["input_ids"]
    single = torch.cat([step(model, more[:, i : i + 1], cache) for i in range(8)], 1)
    cache.crop(-8)
    close(step(model, more, cache), single)


def test_continuous_batching_is_dense_or_refused_and_says_so(device, said):
    prompts = [prompt(tokens, device, seed=tokens)["input_ids"] for tokens in (40, 23)]
    model = make_model("gemma3", device)
    expected = [generate(model, {"input_ids": ids})[0][0].tolist() for ids in prompts]
    enable_quest(model, SPARSE, max_tokens=64)
    options = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    if "paged|sdpa" not in ALL_ATTENTION_FUNCTIONS.valid_keys():  # this transformers has no such names
        with pytest.raises(ValueError, match="quest is not supported for continuous batching"):
            model.generate_batch([ids[0].tolist() for ids in prompts], generation_config=options)
        return
    out = model.generate_batch([ids[0].tolist() for ids in prompts], generation_config=options)
    assert [result.generated_tokens for result in out.values()] == expected
    assert len([message for message in said() if "continuous batching" in message]) == 1


# Messages


def test_the_plan_says_how_each_layer_decodes_and_why(device, said):
    model = make_model("gemma3", device)
    cache = enable_quest(model, QuestConfig(budget=48, dense_layers=2), max_tokens=200)
    assert cache.plan() == [
        (0, "dense", "sliding window of 32 tokens"),
        (1, "dense", "one of the first 2 layers (dense_layers)"),
        (2, "sparse", "reads at most 48 of 208 tokens"),
    ]
    enable_quest(model, QuestConfig(budget=48, dense_layers=2), max_tokens=200)
    assert said() == ["attention 'quest' runs dense in 1 of 3 layers, which have a sliding window of 32 tokens"]


def test_a_model_of_sliding_layers_alone_is_said_to_run_dense(device, said):
    cache = enable_quest(make_model("mistral sliding", device), SPARSE, max_tokens=200)
    assert {entry.path for entry in cache.plan()} == {"dense"}
    assert said()[-1] == "attention 'quest' reads no layer of this model sparsely: sliding window of 32 tokens"


def test_soft_capped_layers_are_said_to_run_dense(device, said):
    model = make_model("gemma2", device)
    cache = enable_quest(model, SPARSE, max_tokens=200)
    assert cache.plan()[2].path == "sparse"
    generate(model, prompt(20, device), cache)
    assert cache.plan()[2] == (2, "dense", "logit soft-capping at 5")
    assert sum("soft-capping" in message for message in said()) == 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_cache_runs_densely_and_says_so_once(kind, device, said):
    model, inputs = make_model("qwen3", device), prompt(50, device, padding=(0, 9))
    expected, _ = generate(model, inputs)
    enable_quest(model, SPARSE, max_tokens=100)
    for _ in range(2):
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=100)
        got, _ = generate(model, inputs, cache)
        assert torch.equal(got, expected)
    assert sum(f"{CACHE_NAME}=quest_ops.transformers.QuestCache" in message for message in said()) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss"])
def test_a_forward_pass_without_a_cache_is_dense(name, device):
    model, inputs = make_model(name, device), prompt(60, device, padding=(0, 13))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        enable_quest(model, FULL, max_tokens=64)
        close(model(**inputs, use_cache=False).logits[real], expected[real])


def test_the_observer_is_told_what_each_layer_read(device):
    model, ids = make_model("llama", device), prompt(100, device)["input_ids"]
    cache = enable_quest(model, SPARSE, max_tokens=200)
    seen = []
    cache.observer = lambda layer, pages, length: seen.append((layer, pages, length))
    step(model, ids, cache)
    assert seen == [], "a prefill reads everything and is not told"
    step(model, prompt(1, device, seed=2)["input_ids"], cache)
    assert [(layer, length) for layer, _, length in seen] == [(i, 101) for i in range(3)]
    assert seen[0][1] is None
    for _, pages, _ in seen[1:]:
        assert pages.shape == (1, 1, 2, SPARSE.num_pages)
        assert (pages[..., -1] == 6).all(), "the page being written is among them"


def test_the_budget_may_change_between_steps(device):
    model, ids = make_model("qwen3", device), prompt(150, device)["input_ids"]
    cache = enable_quest(model, QuestConfig(budget=512, dense_layers=0), max_tokens=200)
    step(model, ids, cache)
    token = prompt(1, device, seed=8)["input_ids"]
    dense = step(model, token, cache)
    cache.crop(-1)
    cache.quest_config = QuestConfig(budget=16, sink_pages=0, dense_layers=0)
    assert not torch.allclose(step(model, token, cache), dense, atol=1e-2)
    cache.crop(-1)
    cache.quest_config = QuestConfig(budget=16, sink_pages=0, dense_layers=3)
    assert torch.equal(step(model, token, cache), dense)


def test_a_cache_made_by_itself_serves_as_well(device):
    model, inputs = make_model("qwen3", device), prompt(60, device)
    expected, _ = generate(model, inputs, enable_quest(model, SPARSE, max_tokens=80))
    model.set_attn_implementation("quest")
    cache = QuestCache(model.config, SPARSE, max_tokens=80, batch_size=1, dtype=torch.float32, device=device)
    assert torch.equal(generate(model, inputs, cache)[0], expected)
