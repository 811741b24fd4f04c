"""The Hugging Face hook-up: full budget equals dense generate, less equals the reference, and errors are clear."""

import copy
import gc
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from quest_ops import QuestConfig, reference
from quest_ops.transformers import QuestCache, enable_quest
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, Qwen3Config, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

COMMON = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    # Large weights: attention of a random model that is far from uniform, and a clear best token.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
SPARSE = QuestConfig(budget=48, page_size=16, dense_layers=1)


def make_model(name="llama", device="cpu", **changes):
    torch.manual_seed(0)
    config = MODELS[name](**{**COMMON, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()


def prompt(tokens, device="cpu", seed=1):
    return torch.randint(1, COMMON["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def generate(model, ids, cache=None, new=12):
    options = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


def step(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 5, 47, 48, 150])
def test_a_budget_that_holds_everything_equals_dense_generate(name, tokens, device):
    model, ids = make_model(name, device), prompt(tokens, device)
    expected, logits = generate(model, ids)
    cache = enable_quest(model, QuestConfig(budget=256, dense_layers=0), max_tokens=200)
    got, sparse_logits = generate(model, ids, cache)
    assert got == expected
    torch.testing.assert_close(sparse_logits, logits, rtol=1e-3, atol=1e-3)


def reference_quest(config):
    """An attention function after ``quest_ops.reference``, for any cache of transformers."""

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        tokens, length = query.shape[2], key.shape[2]
        if tokens > 8:
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        count = reference.num_pages(length, config.page_size)
        padding = (0, 0, 0, count * config.page_size - length)
        k, v = (
            torch.nn.functional.pad(t[0], padding).unflatten(1, (count, config.page_size)).transpose(0, 1)
            for t in (key.cpu(), value.cpu())
        )
        table, lens = torch.arange(count, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32)
        q, pages = query.cpu().transpose(1, 2), None
        if module.layer_idx >= config.dense_layers:
            bounds = k.new_zeros(count, k.shape[1], 2, k.shape[3])
            bounds = reference.update_bounds(k, bounds, table, lens)
            scores = reference.estimate(q, bounds, table, lens, config.page_size)
            pages = reference.topk_pages(
                scores,
                lens,
                config.page_size,
                config.num_pages,
                k.shape[1],
                config.group_reduce,
                config.sink_pages,
                config.recent_pages,
                scaling,
            )
        out, _ = reference.sparse_decode(q, k, v, table, lens, pages, scaling)
        return out.to(query), None

    return attention


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config",
    [
        SPARSE,
        QuestConfig(budget=32, page_size=8, sink_pages=1, dense_layers=0, group_reduce="none"),
        QuestConfig(budget=64, page_size=16, sink_pages=1, recent_pages=3, dense_layers=0),
    ],
    ids=["max", "per head with a sink", "recent window"],
)
def test_less_equals_the_reference(name, config, device):
    model, ids = make_model(name, device), prompt(200, device)
    _, dense = generate(model, ids)
    AttentionInterface.register("quest_reference", reference_quest(config))
    AttentionMaskInterface.register("quest_reference", sdpa_mask)
    model.set_attn_implementation("quest_reference")
    expected, logits = generate(model, ids, DynamicCache(config=model.config))
    got, sparse_logits = generate(model, ids, enable_quest(model, config, max_tokens=300))
    assert got == expected
    torch.testing.assert_close(sparse_logits, logits, rtol=1e-3, atol=1e-3)
    assert (sparse_logits[0] - dense[0]).abs().max() < 1e-3, "the prefill is dense"
    assert (sparse_logits[1] - dense[1]).abs().max() > 1e-2, "the budget must matter, or the test shows nothing"


def test_several_tokens_decode_as_one_by_one(device):
    model, ids = make_model("qwen3", device), prompt(160, device)
    cache = enable_quest(model, SPARSE, max_tokens=200)
    step(model, ids, cache)
    more = prompt(8, device, seed=2)
    single = torch.cat([step(model, more[:, i : i + 1], cache) for i in range(8)], 1)
    cache.crop(-8)
    torch.testing.assert_close(step(model, more, cache), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [16, 50, 99])
def test_a_prefill_in_chunks_equals_a_whole_one(chunk, device):
    model, ids = make_model("llama", device), prompt(200, device)
    whole, parts = (enable_quest(model, SPARSE, max_tokens=256) for _ in range(2))
    expected = step(model, ids, whole)
    got = torch.cat([step(model, piece, parts) for piece in ids.split(chunk, 1) if piece.shape[1] > 8], 1)
    torch.testing.assert_close(got, expected[:, : got.shape[1]], rtol=1e-4, atol=1e-4)


def bounds_of(cache):
    """Bounds of each layer's pages in logical order, on the CPU."""
    return [layer.pages.bounds[layer.pages.page_table[0].long()].cpu() for layer in cache.layers]


@pytest.mark.parametrize("back", [1, 3, 8, 20, 23])
def test_crop_leaves_the_cache_as_if_nothing_had_come(back, device):
    model = make_model("qwen3", device)
    ids, rest = prompt(100, device), prompt(24, device, seed=3)
    cache = enable_quest(model, SPARSE, max_tokens=256)
    step(model, ids, cache)
    for token in rest.split(1, 1):
        step(model, token, cache)
    kept = 124 - back
    before = bounds_of(cache)
    cache.crop(-back)
    assert int(cache.get_seq_length()) == kept
    used = reference.num_pages(kept, 16)
    for layer, old, new in zip(cache.layers, before, bounds_of(cache), strict=True):
        keys = layer.keys[0, :, :kept].cpu()
        last = keys[:, (used - 1) * 16 :]
        assert torch.equal(new[: used - 1], old[: used - 1])
        assert torch.equal(new[used - 1], torch.stack([last.amin(1), last.amax(1)], 1))
    expected = step(model, rest[:, 24 - back : 25 - back], cache)
    replay = enable_quest(model, SPARSE, max_tokens=256)
    step(model, ids, replay)
    for token in rest[:, : 25 - back].split(1, 1):
        got = step(model, token, replay)
    assert torch.equal(got, expected)


def test_a_cache_is_ready_again_after_reset(device):
    model, ids = make_model("llama", device), prompt(120, device)
    cache = enable_quest(model, SPARSE, max_tokens=160)
    expected = generate(model, ids, cache)
    generate(model, prompt(30, device, seed=4), enable_quest(model, SPARSE, max_tokens=160))
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    got = generate(model, ids, cache)
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])


def test_a_second_turn_goes_on_where_the_first_ended(device):
    model, ids, more = make_model("llama", device), prompt(60, device), prompt(40, device, seed=5)
    full = QuestConfig(budget=512, dense_layers=0)
    cache = enable_quest(model, full, max_tokens=300)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    second = torch.cat([first, more], 1)
    got, _ = generate(model, second, cache)
    model.set_attn_implementation("sdpa")
    expected, _ = generate(model, second)
    assert got == expected


def test_a_copy_of_the_cache_is_a_cache_of_its_own(device):
    model, ids = make_model("qwen3", device), prompt(150, device)
    cache = enable_quest(model, SPARSE, max_tokens=200)
    step(model, ids, cache)
    twin = copy.deepcopy(cache)
    token, other = prompt(1, device, seed=6), prompt(1, device, seed=7)
    step(model, other, twin)
    step(model, other, twin)
    expected = step(model, token, copy.deepcopy(cache))
    assert torch.equal(step(model, token, cache), expected)
    assert int(twin.get_seq_length()) == 152
    assert int(cache.get_seq_length()) == 151


def test_the_budget_may_change_between_steps(device):
    model, ids = make_model("qwen3", device), prompt(150, device)
    cache = enable_quest(model, QuestConfig(budget=512, dense_layers=0), max_tokens=200)
    step(model, ids, cache)
    token = prompt(1, device, seed=8)
    dense = step(model, token, cache)
    cache.crop(-1)
    cache.quest_config = QuestConfig(budget=16, dense_layers=0)
    sparse = step(model, token, cache)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    cache.crop(-1)
    cache.quest_config = QuestConfig(budget=16, dense_layers=4)
    assert torch.equal(step(model, token, cache), dense)


def test_the_observer_is_told_what_each_layer_read(device):
    model, ids = make_model("llama", device), prompt(100, device)
    cache = enable_quest(model, SPARSE, max_tokens=200)
    seen = []
    cache.observer = lambda layer, pages, length: seen.append((layer, pages, length))
    step(model, ids, cache)
    assert seen == [], "a prefill reads everything and is not told"
    step(model, prompt(1, device, seed=2), cache)
    assert [(layer, length) for layer, _, length in seen] == [(i, 101) for i in range(4)]
    assert seen[0][1] is None
    for _, pages, _ in seen[1:]:
        assert pages.shape == (1, 1, 2, SPARSE.num_pages)
        assert (pages[..., -1] == 6).all(), "the page being written is among them"


def test_the_cache_works_densely_under_another_implementation(device):
    model, ids = make_model("qwen3", device), prompt(120, device)
    expected, _ = generate(model, ids)
    got, _ = generate(model, ids, QuestCache(model.config, SPARSE, max_tokens=200))
    assert model.config._attn_implementation == "sdpa"
    assert got == expected


def test_memory_goes_with_the_cache(device):
    model = make_model("llama", device)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, prompt(20, device), cache)
    keys = weakref.ref(cache.layers[0].keys)
    table = weakref.ref(cache.layers[0].pages.page_table)
    gc.disable()
    try:
        del cache
        assert keys() is None
        assert table() is None
    finally:
        gc.enable()


def test_a_forward_pass_without_a_cache_is_dense(device):
    model, ids = make_model("llama", device), prompt(40, device)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        enable_quest(model, SPARSE, max_tokens=64)
        assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_cache_runs_densely_and_says_so(kind, device):
    model, ids = make_model("qwen3", device), prompt(50, device)
    expected, _ = generate(model, ids)
    enable_quest(model, SPARSE, max_tokens=100)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=100)
    with pytest.warns(UserWarning, match="QuestCache"):
        got, _ = generate(model, ids, cache)
    assert got == expected


# Errors: each says what was wrong, and nothing was computed.


def test_a_cache_too_small_is_an_error_before_anything_is_written(device):
    model = make_model("llama", device)
    cache = enable_quest(model, SPARSE, max_tokens=60)
    step(model, prompt(50, device), cache)
    keys = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="holds 64 tokens, 50 of them taken, and was given 20 more"):
        step(model, prompt(20, device, seed=2), cache)
    assert int(cache.get_seq_length()) == 50
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, keys, strict=True))
    step(model, prompt(14, device, seed=2), cache)


def test_left_padding_is_an_error(device):
    model, ids = make_model("llama", device), prompt(40, device)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    cache = enable_quest(model, SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match="padding"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_a_mask_of_ones_own_is_an_error(tokens, device):
    model = make_model("llama", device)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, prompt(30, device), cache)
    mask = torch.ones(1, 1, tokens, 30 + tokens, dtype=torch.bool, device=device).tril(30)
    mask[..., 3] = False
    with pytest.raises(ValueError, match="masks of one's own"), torch.no_grad():
        model(prompt(tokens, device), attention_mask=mask, past_key_values=cache)


def test_more_than_one_sequence_is_an_error(device):
    model = make_model("llama", device)
    with pytest.raises(ValueError, match="batch_size must be 1"):
        QuestCache(model.config, SPARSE, max_tokens=64, batch_size=2)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match="one sequence"):
        step(model, prompt(20, device).repeat(2, 1), cache)
    with pytest.raises(ValueError, match="one sequence"):
        model.generate(prompt(20, device), past_key_values=cache, num_beams=2, max_new_tokens=2)


def test_a_head_dim_that_the_kernels_lack_is_an_error():
    with pytest.raises(ValueError, match="head_dim must be one of 64, 80.*got 32"):
        QuestCache(LlamaConfig(**{**COMMON, "head_dim": 32}), SPARSE, max_tokens=64)


def test_sliding_window_layers_are_an_error():
    config = Qwen3Config(**COMMON, use_sliding_window=True, sliding_window=32, max_window_layers=2)
    with pytest.raises(ValueError, match="got sliding_attention in layer 2"):
        QuestCache(config, SPARSE, max_tokens=64)


def test_a_dtype_that_the_kernels_lack_is_an_error():
    model = make_model("llama").double()
    cache = enable_quest(model, SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        step(model, prompt(20), cache)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_a_cache_of_no_tokens_is_an_error(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be at least 1, got {max_tokens}"):
        QuestCache(LlamaConfig(**COMMON), SPARSE, max_tokens=max_tokens)


def test_another_page_size_for_a_cache_is_an_error():
    cache = QuestCache(LlamaConfig(**COMMON), SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match="made with 16, got 32"):
        cache.quest_config = QuestConfig(budget=64, page_size=32)


def test_cropping_more_than_there_is_is_an_error(device):
    model = make_model("llama", device)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, prompt(20, device), cache)
    with pytest.raises(ValueError, match="cannot remove 21 tokens from a cache of 20"):
        cache.crop(-21)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
