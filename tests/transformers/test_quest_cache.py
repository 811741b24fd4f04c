"""QuestCache by itself: cropping, copies, memory, and errors before anything is written."""

import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import COMMON, WINDOW, generate, make_model, passing, prompt, step
from quest_ops import QuestConfig, reference, update_bounds
from quest_ops.transformers import QuestCache, enable_quest
from quest_ops.transformers.sliding import SLACK
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, Qwen3Config

SPARSE = QuestConfig(budget=48, page_size=16, dense_layers=1)
BOUNDS = pytest.mark.parametrize("bounds", ["cache", "int8", "int4"])


def bounds_of(cache):
    """The bounds of each paged layer, on the CPU."""
    return [layer.state.k_bounds[0].cpu() for layer in cache.layers if hasattr(layer, "state")]


@pytest.mark.parametrize("back", [1, 8, 20, 23])
@pytest.mark.parametrize("std_factor", [None, 1.0])
def test_crop_leaves_the_cache_as_if_nothing_had_come(back, std_factor, device):
    model, config = make_model("gemma3", device), replace(SPARSE, bounds="cache", std_factor=std_factor)
    ids, rest = prompt(100, device)["input_ids"], prompt(24, device, seed=3)["input_ids"]
    cache = enable_quest(model, config, max_tokens=256)
    step(model, ids, cache)
    for token in rest.split(1, 1):
        step(model, token, cache)
    before = bounds_of(cache)
    cache.crop(-back)
    kept = 124 - back
    assert int(cache.get_seq_length()) == kept
    used = reference.num_pages(kept, 16)
    for layer, old, new in zip(cache.layers[1:], before, bounds_of(cache), strict=True):
        last = reference.bounds_of(layer.keys[used - 1, :, : kept - (used - 1) * 16].cpu(), std_factor)
        assert torch.equal(new[: used - 1], old[: used - 1])
        assert torch.equal(new[used - 1], last)
    expected = step(model, rest[:, 24 - back : 25 - back], cache)
    replay = enable_quest(model, config, max_tokens=256)
    step(model, ids, replay)
    for token in rest[:, : 25 - back].split(1, 1):
        got = step(model, token, replay)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_crop_renews_int8_bounds(device):
    model, ids = make_model("qwen3", device), prompt(100, device)["input_ids"]
    cache, short = (enable_quest(model, SPARSE, max_tokens=128) for _ in range(2))
    step(model, ids, cache)
    cache.crop(-13)
    step(model, ids[:, :87], short)
    for layer, other in zip(cache.layers, short.layers, strict=True):
        (keys, _, bounds, scales), others = layer.state.layer(0), other.state.layer(0).k_scales
        fresh = torch.zeros_like(bounds), torch.zeros_like(scales)
        update_bounds(keys, fresh[0], layer.state.page_table, layer.seq_lens, None, fresh[1], layer.state.std_factor)
        assert torch.equal(bounds[:6], fresh[0][:6])
        assert torch.equal(scales[:6], fresh[1][:6])
        assert scales[:6].gt(0).all()
        torch.testing.assert_close(scales[:6], others[:6], rtol=1e-3, atol=1e-4)


@BOUNDS
def test_a_copy_of_the_cache_is_a_cache_of_its_own(bounds, device):
    model, ids = make_model("qwen3", device), prompt(150, device)["input_ids"]
    cache = enable_quest(model, replace(SPARSE, bounds=bounds), max_tokens=200)
    step(model, ids, cache)
    twin = copy.deepcopy(cache)
    token, other = prompt(1, device, seed=6)["input_ids"], prompt(1, device, seed=7)["input_ids"]
    step(model, other, twin)
    step(model, other, twin)
    expected = step(model, token, copy.deepcopy(cache))
    assert torch.equal(step(model, token, cache), expected)
    assert int(twin.get_seq_length()) == 152
    assert int(cache.get_seq_length()) == 151


# Lengths


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_share_their_lengths_after_a_first_step(name, device):
    model = make_model(name, device)
    cache = enable_quest(model, SPARSE, max_tokens=256)
    step(model, prompt(100, device)["input_ids"], cache)
    first = cache.layers[0].seq_lens
    for tokens, length in ((1, 101), (4, 105)):
        step(model, prompt(tokens, device)["input_ids"], cache)
        *others, last = cache.layers
        assert last.moves_lengths
        assert last.seq_lens.tolist() == [length]
        assert last.next_lens.tolist() == [length + 1]
        assert not any(layer.moves_lengths for layer in others)
        assert all(layer.seq_lens is last.seq_lens for layer in others)
    assert first is not last.seq_lens
    cache.crop(-5)
    assert (last.seq_lens.item(), last.next_lens.item(), int(cache.get_seq_length())) == (100, 101, 100)
    cache.prepare(2, 256)
    step(model, prompt(9, device)["input_ids"].repeat(2, 1), cache)
    assert [layer.seq_lens.tolist() for layer in cache.layers] == [[9, 9]] * 3
    assert all(layer.moves_lengths for layer in cache.layers)


def test_a_step_that_ends_before_its_last_layer_is_an_error_in_the_next(device, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise InterruptedError

    model, ids = make_model("llama", device), prompt(20, device)["input_ids"]
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, ids, cache)
    expected = step(model, ids[:, :1], cache)
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], "update", interrupt)
        with pytest.raises(InterruptedError):
            step(model, ids[:, :1], cache)
    with pytest.raises(RuntimeError, match=r"hold 21 to 22 tokens.*call cache\.reset\(\)"):
        step(model, ids[:, :1], cache)
    cache.reset()
    step(model, ids, cache)
    assert torch.equal(step(model, ids[:, :1], cache), expected)


def test_layers_of_each_device_share_lengths_of_their_own():
    model = make_model("llama")
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, prompt(9, "cpu")["input_ids"], cache)
    first, middle, last = cache.layers
    middle.device = torch.device("meta")  # as if it lay on another device
    cache.get_mask_sizes(1, 0)
    assert [layer.moves_lengths for layer in cache.layers] == [False, True, True]
    assert first.seq_lens is last.seq_lens is not middle.seq_lens


# Memory


def tensors_of(layer):
    """The tensors of a layer and of its KVState, one for each storage."""
    held = [*vars(layer).values(), *(vars(layer.state).values() if hasattr(layer, "state") else ())]
    tensors = [x for x in held if isinstance(x, torch.Tensor)]
    return list({x.untyped_storage().data_ptr(): x for x in tensors}.values())


@BOUNDS
def test_a_cache_costs_its_keys_values_and_bounds(bounds, device):
    model, config = make_model("gemma3", device), replace(SPARSE, bounds=bounds)
    small, large = (enable_quest(model, config, max_tokens=n, batch_size=2) for n in (1024, 2048))

    def bytes_of(layer):
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(layer))

    token = 2 * COMMON["num_key_value_heads"] * COMMON["head_dim"] * 2 * 4  # of both rows, keys and values
    table = 2 * 4  # an int32 for each page of both rows
    # In float32 a page's two bounds take the bytes of a token's key and value. Fewer bits add a scale a head.
    scales = 0 if bounds == "cache" else 2 * COMMON["num_key_value_heads"] * 4
    of_a_page = token // {"cache": 1, "int8": 4, "int4": 8}[bounds] + scales
    sliding, *paged = zip(small.layers, large.layers, strict=True)
    assert bytes_of(sliding[0]) == bytes_of(sliding[1]) <= token * (WINDOW + SLACK + 1) + 64
    for fewer, more in paged:
        pages = 1024 // 16
        assert bytes_of(more) - bytes_of(fewer) == 1024 * token + pages * (of_a_page + table)


def test_decoding_leaves_nothing_behind(device):
    model = make_model("gemma3", device)
    cache = enable_quest(model, SPARSE, max_tokens=256)
    step(model, prompt(40, device)["input_ids"], cache)

    def held():
        gc.collect()
        return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor)

    token = prompt(1, device, seed=2)["input_ids"]
    step(model, token, cache)
    before = held()
    for _ in range(60):
        step(model, token, cache)
    assert held() == before


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_memory_goes_with_the_cache(name, device):
    model = make_model(name, device)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    gc.collect()
    gc.disable()
    try:
        generate(model, prompt(20, device, padding=(0, 3)), cache)
        left = [weakref.ref(tensor) for layer in cache.layers for tensor in tensors_of(layer)]
        del cache
        assert len(left) > 10
        assert not any(reference() is not None for reference in left)
    finally:
        gc.enable()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that PyTorch makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                # Expanded dimensions take no memory.
                spread = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
                self.elements = max(self.elements, torch.Size(spread).numel())
        return out


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_padded_prefill_makes_nothing_of_the_size_of_the_prompt_squared(name, device):
    tokens = 1536
    model, inputs = make_model(name, device, num_hidden_layers=3), prompt(tokens, device, padding=(0, 100))
    cache = enable_quest(model, SPARSE, max_tokens=tokens)
    with Largest() as seen, torch.no_grad():
        model.model(**inputs, **passing(cache))
    with Largest() as usual, torch.no_grad():
        make_model(name, device).model(**inputs, **passing(DynamicCache(config=model.config)))
    assert seen.elements < 2 * tokens * tokens / 2
    assert usual.elements >= 2 * tokens * tokens, "the measure must see a mask, or the test shows nothing"


# Errors


def unchanged(cache):
    return [tensor.clone() for layer in cache.layers for tensor in tensors_of(layer)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_too_small_is_an_error_before_anything_is_written(name, device):
    model = make_model(name, device)
    cache = enable_quest(model, SPARSE, max_tokens=60)
    step(model, prompt(50, device)["input_ids"], cache)
    before = unchanged(cache)
    with pytest.raises(ValueError, match="holds 64 tokens, 50 of them taken, and was given 20 more"):
        step(model, prompt(20, device, seed=2)["input_ids"], cache)
    assert all(torch.equal(x, y) for x, y in zip(unchanged(cache), before, strict=True))
    step(model, prompt(14, device, seed=2)["input_ids"], cache)


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_a_mask_of_ones_own_is_an_error(tokens, device):
    model = make_model("llama", device)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, prompt(30, device)["input_ids"], cache)
    before = unchanged(cache)
    mask = torch.ones(1, 1, tokens, 30 + tokens, dtype=torch.bool, device=device).tril(30)
    with pytest.raises(ValueError, match="honours left padding and nothing else"):
        step(model, prompt(tokens, device)["input_ids"], cache, attention_mask=mask)
    assert all(torch.equal(x, y) for x, y in zip(unchanged(cache), before, strict=True))


def test_padding_that_is_not_on_the_left_is_an_error(device):
    model, ids = make_model("llama", device), prompt(20, device)["input_ids"]
    for columns in ([19], [3, 4]):
        mask = torch.ones_like(ids)
        mask[0, columns] = 0
        with pytest.raises(ValueError, match="padding behind or between"):
            step(model, ids, enable_quest(model, SPARSE, max_tokens=64), attention_mask=mask)


def test_a_mask_that_contradicts_the_cache_is_an_error(device):
    model = make_model("llama", device)
    ids, more = prompt(20, device)["input_ids"], prompt(9, device, seed=2)["input_ids"]
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, ids, cache)
    with pytest.raises(ValueError, match="got 9 columns for 20 tokens in the cache and 9 new ones"):
        step(model, more, cache, attention_mask=torch.ones_like(more))
    mask = torch.ones(1, 29, dtype=torch.int64, device=device)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match=r"rows of \[16\] tokens where the cache holds \[20\]"):
        step(model, more, cache, attention_mask=mask)


def test_another_implementation_is_an_error(device):
    model = make_model("qwen3", device)
    cache = QuestCache(model.config, SPARSE, max_tokens=64)
    with pytest.raises(RuntimeError, match=r"set_attn_implementation\('quest'\)"):
        generate(model, prompt(20, device), cache)


def test_another_batch_is_an_error(device):
    model = make_model("llama", device)
    cache = enable_quest(model, SPARSE, max_tokens=64)
    step(model, prompt(20, device)["input_ids"], cache)
    with pytest.raises(ValueError, match="made for a batch of 1, got 2"):
        step(model, prompt(20, device, padding=(0, 0))["input_ids"], cache)


def test_a_head_dim_that_the_kernels_lack_is_an_error():
    with pytest.raises(ValueError, match="head_dim must be one of 64, 80.*got 32"):
        QuestCache(LlamaConfig(**{**COMMON, "head_dim": 32}), SPARSE, max_tokens=64)


def test_layers_of_another_kind_are_an_error():
    config = Qwen3Config(**COMMON)
    config.layer_types = ["full_attention", "full_attention", "chunked_attention"]
    config.attention_chunk_size = 32
    with pytest.raises(ValueError, match="got chunked_attention in layer 2"):
        QuestCache(config, SPARSE, max_tokens=64)


def test_a_dtype_that_the_kernels_lack_is_an_error():
    model = copy.deepcopy(make_model("llama")).double()
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        enable_quest(model, SPARSE, max_tokens=64)


def test_training_is_an_error(device):
    model = copy.deepcopy(make_model("llama", device, attention_dropout=0.1)).train()
    cache = enable_quest(model, SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first, got dropout 0\.1"):
        step(model, prompt(20, device)["input_ids"], cache)


@pytest.mark.parametrize(("name", "value"), [("max_tokens", 0), ("max_tokens", -5), ("batch_size", 0)])
def test_a_cache_of_nothing_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        QuestCache(LlamaConfig(**COMMON), SPARSE, **{"max_tokens": 64, name: value})


def test_another_page_size_for_a_cache_is_an_error():
    cache = QuestCache(LlamaConfig(**COMMON), SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match="page_size of a cache cannot change: it was made with 16, got 32"):
        cache.quest_config = QuestConfig(budget=64, page_size=32)


def test_other_bounds_for_a_cache_are_an_error():
    cache = QuestCache(LlamaConfig(**COMMON), SPARSE, max_tokens=64)
    with pytest.raises(ValueError, match="bounds of a cache cannot change: it was made with int4, got cache"):
        cache.quest_config = replace(SPARSE, bounds="cache")
    with pytest.raises(ValueError, match="std_factor of a cache cannot change: it was made with 1.0, got None"):
        cache.quest_config = replace(SPARSE, std_factor=None)


# Gradients


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_a_step_over_the_cache_has_no_backward(name, tokens, device):
    """Otherwise gradients would stop at the cache silently."""
    model = make_model(name, device)
    cache = enable_quest(model, SPARSE, max_tokens=200)
    step(model, prompt(100, device)["input_ids"], cache)
    logits = model(prompt(tokens, device, seed=2)["input_ids"], **passing(cache)).logits
    with pytest.raises(RuntimeError, match="attention 'quest' over a QuestCache has no backward"):
        logits.sum().backward()


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt-oss"])
def test_a_first_prefill_has_the_gradients_of_dense_attention(name, device):
    model, ids = make_model(name, device), prompt(60, device)["input_ids"]
    weight = model.model.layers[-1].self_attn.k_proj.weight

    def gradient(**options):
        return torch.autograd.grad(model(ids, **options).logits.square().mean(), weight)[0]

    expected = gradient(use_cache=False)
    cache = enable_quest(model, SPARSE, max_tokens=200)
    got = gradient(**passing(cache))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in tensors_of(layer))


def test_cropping_more_than_can_be_is_an_error(device):
    model = make_model("gemma3", device)
    cache = enable_quest(model, SPARSE, max_tokens=400)
    step(model, prompt(20, device)["input_ids"], cache)
    with pytest.raises(ValueError, match="cannot remove 21 tokens from a cache of 20"):
        cache.crop(-21)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    step(model, prompt(300, device)["input_ids"], cache)
    with pytest.raises(ValueError, match=f"can crop {SLACK - 8} tokens at most, got {SLACK - 7}"):
        cache.crop(7 - SLACK)


def test_a_window_without_full_layers_takes_any_head_dim():
    config = Gemma3TextConfig(**{**COMMON, "head_dim": 32}, sliding_window=8, layer_types=["sliding_attention"] * 3)
    QuestCache(config, SPARSE, max_tokens=64)


def test_two_processes_of_tensor_parallel_decode_the_same_tokens(tmp_path):
    model, inputs = make_model("qwen3"), prompt(70, padding=(0, 9))
    got, _ = generate(model, inputs, enable_quest(model, SPARSE, max_tokens=96))
    model.save_pretrained(tmp_path)
    torch.save({**inputs, "expected": got}, tmp_path / "case.pt")
    script = Path(__file__).parents[1] / "helpers" / "tensor_parallel_worker.py"
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=200)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
