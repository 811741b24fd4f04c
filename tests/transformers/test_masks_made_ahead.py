"""Models that take no mask for a mask of ones, and get the masks of their steps from ``generate``."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import generate, prompt
from helpers.tiny_models import tiny_model
from quest_ops import QuestConfig
from quest_ops.transformers import enable_quest
from quest_ops.transformers.masks import quest_mask
from transformers import StaticCache

MODELS = pytest.mark.parametrize("name", ["biogpt", "bart", "marian", "opt"])


@MODELS
def test_a_padded_batch_equals_dense(name, device):
    inputs = prompt(90, device, padding=(0, 31))
    model = tiny_model(name).to(device)
    expected, logits = generate(model, inputs, StaticCache(model.config, max_cache_len=200))
    cache = enable_quest(model, QuestConfig(budget=112, dense_layers=0), max_tokens=200)
    got, sparse_logits = generate(model, inputs, cache)
    assert torch.equal(got, expected)
    torch.testing.assert_close(sparse_logits, logits, rtol=1e-3, atol=1e-3)
    assert [layer.seq_lens.tolist() for layer in cache.layers] == [[97, 66]] * len(cache.layers)


@pytest.mark.parametrize("name", ["biogpt", "opt"])  # the others take padding for positions, dense or not
def test_padding_changes_nothing_under_a_small_budget(name, device):
    batch, config = prompt(90, device, padding=(0, 31)), QuestConfig(budget=16, sink_pages=0, dense_layers=0)
    model = tiny_model(name).to(device)
    together, _ = generate(model, batch, enable_quest(model, config, max_tokens=200))
    for row, count in enumerate((0, 31)):
        alone = {key: tensor[row : row + 1, count:] for key, tensor in batch.items()}
        got, _ = generate(model, alone, enable_quest(model, config, max_tokens=200))
        assert torch.equal(got[0], together[row])


def test_a_single_token_has_a_mask_where_its_row_has_padding(device):
    mask = torch.ones(2, 10, dtype=torch.bool, device=device)
    assert quest_mask(2, 1, 1, torch.tensor(9), attention_mask=mask) is None or device == "cuda"
    mask[1, :4] = False
    assert quest_mask(2, 1, 1, torch.tensor(9), attention_mask=mask).flatten().tolist() == [1, 1]
    # More tokens run faster without a mask where they are all real.
    assert quest_mask(2, 3, 3, torch.tensor(7), attention_mask=mask) is None
