"""QuestConfig.reselect_every in Hugging Face models: the tokens of the same rule as a selector, eager and compiled."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import compiled, generate, make_model, prompt
from helpers.kept_lists import lists_to_read
from quest_ops import QuestConfig, select_pages
from quest_ops.transformers import enable_quest
from torch._dynamo.utils import counters

EVERY, S = 3, 16
CONFIG = QuestConfig(48, S, dense_layers=1, reselect_every=EVERY)


class Rule:
    """The rule as a selector, which each sparse layer calls once a step."""

    def __init__(self):
        self.steps, self.lists = {}, {}

    def __call__(self, layer, q, pages, config):
        fresh = select_pages(q, pages.k_bounds, pages.page_table, pages.seq_lens, config, pages.scale, pages.k_scales)
        self.steps[layer] = self.steps.get(layer, -1) + 1 if q.shape[1] == 1 else -1
        if self.steps[layer] <= 0:
            self.lists[layer] = fresh
            return fresh
        self.lists[layer], _ = lists_to_read(fresh, self.lists[layer], pages.seq_lens, S, EVERY)
        return self.lists[layer]


def by_rule(model, inputs, **options):
    config = replace(CONFIG, reselect_every=1, selector=Rule())
    return generate(model, inputs, enable_quest(model, config, max_tokens=160), new=20, **options)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "lookup"])
def test_the_tokens_of_the_rule(options, device):
    padding = (0,) if options else (0, 50)
    model, inputs = make_model("qwen3", device), prompt(90, device, padding=padding)
    expected, exact = by_rule(model, inputs, **options)
    cache = enable_quest(model, CONFIG, max_tokens=160)
    for _ in range(2):  # the second generate reuses the cache
        got, logits = generate(model, inputs, cache, new=20, **options)
        assert torch.equal(got, expected)
        torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
        cache.reset()


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_one_compiled_step(backend, device):
    model, inputs = make_model("qwen3", device), prompt(90, device, padding=(0, 37))
    expected, logits = by_rule(model, inputs)
    model._compiled_call = model._last_compile_config = None
    counters.clear()
    cache = enable_quest(model, CONFIG, max_tokens=160)
    got, compiled_logits = generate(model, inputs, cache, new=20, **compiled(backend, device))
    assert torch.equal(got, expected)
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_observer_and_the_report(device):
    model, inputs, seen = make_model("qwen3", device), prompt(90, device), []
    cache = enable_quest(model, CONFIG, max_tokens=160)
    cache.start_report()
    cache.observer = lambda layer, pages, _: seen.append((layer, pages))
    generate(model, inputs, cache, new=9)
    lists = [pages for layer, pages in seen if layer == 1]
    assert len(lists) == 8 and lists[0].shape == (1, 1, 2, 3)
    changes = [not torch.equal(*(x[..., :-1] for x in pair)) for pair in pairwise(lists)]
    # The tokens after a prompt of 90 are at places 10 to 17 of a page and the next, and select at 12, 15 and 16.
    assert not any(changes[step] for step, place in enumerate(range(11, 18)) if place % S % EVERY)
    assert cache.report()[1].pages_read == 8 * 2 * 3


def test_a_cache_without_the_lists():
    model = make_model("qwen3", "cpu")
    cache = enable_quest(model, replace(CONFIG, reselect_every=1), max_tokens=64)
    sentence = "reselect_every of a cache that keeps lists of 0 pages must be 1, got 3 with 3 pages"
    with pytest.raises(ValueError, match=sentence):
        cache.quest_config = CONFIG
    cache = enable_quest(model, CONFIG, max_tokens=64)
    cache.quest_config = replace(CONFIG, reselect_every=1)
    cache.quest_config = replace(CONFIG, budget=32, reselect_every=8)
    assert cache.quest_config.reselect_every == 8
