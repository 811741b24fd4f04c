"""Steps that are not causal: image blocks, prefixes, is_causal=False. Their prefill is dense, their decoding sparse."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers import hf_multimodal
from helpers.hf_models import generate, make_model, prompt, step
from helpers.hf_multimodal import image_prompt
from quest_ops import QuestConfig
from quest_ops.transformers import disable_quest, enable_quest
from quest_ops.transformers.generation import CACHE_NAME
from transformers import DynamicCache

FULL = QuestConfig(budget=112, dense_layers=0)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def reports_sparse_steps(cache, steps):
    return [(layer.steps, layer.prefills) for layer in cache.report()] == [(steps, 1)] * len(cache.layers)


# Images and prefixes


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("padding", [(0,), (0, 31)], ids=["one row", "padded"])
@pytest.mark.parametrize("length", [24, 90])
def test_token_types_equal_dense_generate(name, image, padding, length, device):
    if length < 40 and len(padding) > 1:
        padding = (0, 5)
    model = hf_multimodal.make_model(name, device)
    inputs = image_prompt(name, length, device, padding=padding, image=image, suffix=6)
    expected, logits = generate(model, dict(inputs))
    cache = enable_quest(model, FULL, max_tokens=200)
    cache.start_report()
    got, sparse_logits = generate(model, dict(inputs), cache)
    disable_quest(model)
    assert torch.equal(got, expected)
    assert (sparse_logits - logits).abs().max() < 2e-4 * logits.abs().max()
    assert reports_sparse_steps(cache, 7)
    assert cache.plan()[-1].path == "sparse"
    if image:
        causal = model(**{**inputs, "token_type_ids": None}, use_cache=False).logits[:, -1]
        assert (causal - logits[:, 0]).abs().max() > 1e-2, "the blocks must matter, or the test shows nothing"


def test_an_image_in_a_later_turn_sees_itself(device):
    model = hf_multimodal.make_model("gemma3", device)
    whole = image_prompt("gemma3", 90, device, at=60)
    with torch.no_grad():
        expected = model(**whole, use_cache=False).logits[:, 50:]
        cache = enable_quest(model, FULL, max_tokens=200)
        first = {key: whole[key][:, :50] for key in ("input_ids", "attention_mask", "token_type_ids")}
        model(**first, **{CACHE_NAME: cache})
        rest = {key: whole[key][:, 50:] for key in ("input_ids", "token_type_ids")}
        rest.update(attention_mask=whole["attention_mask"], pixel_values=whole["pixel_values"])
        got = model(**rest, **{CACHE_NAME: cache}).logits
    disable_quest(model)
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [6, 600])
def test_a_mask_of_ones_own_over_the_new_tokens_is_honoured(name, rows, tokens, device):
    if name == "gemma3":
        tokens = min(tokens, 30)  # a mask for its window too would be another
    model, ids = make_model(name, device), prompt(tokens, device, padding=(0,) * rows)["input_ids"]
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    mask[:, :, :4, :4] = True
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        causal = model(ids, use_cache=False).logits
    cache = enable_quest(model, FULL, max_tokens=640)
    close(step(model, ids, cache, attention_mask=mask), expected)
    assert (causal - expected)[:, :4].abs().max() > 1e-2


def test_a_mask_of_ones_own_that_hides_columns_is_an_error(device):
    model, ids = make_model("llama", device), prompt(20, device)["input_ids"]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=device).tril()
    mask[..., 12] = False
    cache = enable_quest(model, FULL, max_tokens=64)
    with pytest.raises(ValueError, match="padding behind or between"):
        step(model, ids, cache, attention_mask=mask)
    assert int(cache.get_seq_length()) == 0


# is_causal


# gpt-oss is dense in eager attention, which knows masks and no is_causal.
WAYS = [(name, way) for name in ("qwen3", "llama") for way in ("argument", "module", "config")] + [
    ("gpt-oss", "config")
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_bidirectional_prefill_is_bidirectional(name, way, device, monkeypatch):
    model, ids = make_model(name, device), prompt(30, device)["input_ids"]
    options = {"is_causal": False} if way == "argument" else {}
    with torch.no_grad():
        causal = model(ids, use_cache=False).logits
        if way == "config":
            monkeypatch.setattr(model.config, "is_causal", False, raising=False)
        for layer in model.model.layers:
            monkeypatch.setattr(layer.self_attn, "is_causal", way != "module", raising=False)
        expected = model(ids, use_cache=False, **options).logits
        cache = enable_quest(model, FULL, max_tokens=100)
        got = step(model, ids, cache, **options)
        without = model(ids, use_cache=False, **options).logits
    close(got, expected)
    close(without, expected)
    assert (causal - expected).abs().max() > 1e-1


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_a_bidirectional_step_sees_the_cache_and_all_its_tokens(tokens, device):
    model, ids = make_model("qwen3", device), prompt(40 + tokens, device)["input_ids"]
    options = {"is_causal": False}
    with torch.no_grad():
        dense = DynamicCache(config=model.config)
        step(model, ids[:, :40], dense, **options)
        expected = step(model, ids[:, 40:], dense, **options)
    cache = enable_quest(model, FULL, max_tokens=100)
    step(model, ids[:, :40], cache, **options)
    close(step(model, ids[:, 40:], cache, **options), expected)


def test_padding_changes_nothing_in_a_bidirectional_prefill(device):
    model, batch = make_model("qwen3", device), prompt(40, device, padding=(0, 7))
    cache = enable_quest(model, FULL, max_tokens=100)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = step(
        model,
        batch["input_ids"],
        cache,
        attention_mask=batch["attention_mask"],
        is_causal=False,
        position_ids=positions,
    )
    alone = enable_quest(model, FULL, max_tokens=100)
    close(together[1:, 7:], step(model, batch["input_ids"][1:, 7:], alone, is_causal=False))
    assert [layer.seq_lens.tolist() for layer in cache.layers] == [[40, 33]] * 3


def test_a_bidirectional_prefill_longer_than_a_window_is_an_error(device, monkeypatch):
    model, ids = make_model("mistral sliding", device), prompt(40, device)["input_ids"]
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "is_causal", False)
    cache = enable_quest(model, FULL, max_tokens=64)
    with pytest.raises(ValueError, match="is_causal=False is not supported for 40 tokens in layer 0.*window of 32"):
        step(model, ids, cache)
    assert int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("name", ["mistral sliding", "gemma3"])
def test_a_bidirectional_window_is_that_of_the_model(name, device, monkeypatch):
    model, ids = make_model(name, device), prompt(71, device)["input_ids"]
    monkeypatch.setattr(model.config, "is_causal", False, raising=False)
    dense, steps = DynamicCache(config=model.config), (ids[:, :70], ids[:, 70:])
    expected = [step(model, new, dense) for new in steps]
    cache = enable_quest(model, FULL, max_tokens=200)
    for new, logits in zip(steps, expected, strict=True):
        close(step(model, new, cache), logits)
    with pytest.raises(ValueError, match="a bidirectional step of 4 tokens over a cache of 71 is not supported"):
        step(model, ids[:, :4], cache)
