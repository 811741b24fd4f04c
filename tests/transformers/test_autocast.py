"""Autocast over a float32 model: keys are float32 after their rotation, and values are bfloat16."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import generate, make_model, prompt, step
from quest_ops import QuestConfig
from quest_ops.transformers import enable_quest

FULL = QuestConfig(budget=112, dense_layers=0)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("allocated", [False, True])
def test_autocast_errs_no_more_than_dense_autocast(name, allocated, device):
    inputs = prompt(90, device, padding=(0, 31))
    model = make_model(name, device)
    _, exact = generate(model, inputs, new=1)
    with torch.autocast(device, torch.bfloat16):
        _, dense = generate(model, inputs, new=1)
    enable_quest(model, FULL, max_tokens=200)
    cache = enable_quest(model, FULL, max_tokens=200, **({"batch_size": 2} if allocated else {}))
    with torch.autocast(device, torch.bfloat16):
        _, got = generate(model, inputs, cache, new=1)
    # A cache that autocast allocates has its dtype; one that was there keeps the model's.
    assert {layer.dtype for layer in cache.layers} == {torch.float32 if allocated else torch.bfloat16}
    assert error(got, exact) <= 2 * error(dense, exact)


@pytest.mark.parametrize("allocated", [False, True])
def test_decoding_steps_under_autocast_err_no_more_than_dense_ones(allocated, device):
    ids, more = prompt(90, device)["input_ids"], prompt(4, device, seed=2)["input_ids"]
    model = make_model("qwen3", device)
    with torch.no_grad():
        exact = model(torch.cat([ids, more], 1)).logits[:, -4:]
        with torch.autocast(device, torch.bfloat16):
            dense = model(torch.cat([ids, more], 1)).logits[:, -4:]
    cache = enable_quest(model, FULL, max_tokens=200, **({"batch_size": 1} if allocated else {}))
    cache.start_report()
    with torch.autocast(device, torch.bfloat16):
        step(model, ids, cache)
        got = torch.cat([step(model, more[:, i : i + 1], cache) for i in range(4)], 1)
    assert [layer.steps for layer in cache.report()] == [4] * 3
    assert error(got, exact) <= 2 * error(dense, exact)


def test_values_of_another_dtype_are_refused_before_anything_is_stored(device):
    cache = enable_quest(make_model("qwen3", device), FULL, max_tokens=64, batch_size=1)
    keys = torch.zeros(1, 2, 3, 64, device=device)
    with pytest.raises(ValueError, match=r"layer 0 of this QuestCache holds torch.float32 on \S+, got torch.bfloat16"):
        cache.update(keys, keys.bfloat16(), 0)
    assert cache.layers[0].columns == 0
    cache.update(keys, keys, 0)  # the refused call left nothing behind


def error(actual, expected):
    return float((actual.float() - expected).norm() / expected.norm())
