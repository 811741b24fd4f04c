"""QuestConfig.selector in Hugging Face models."""

from dataclasses import replace

import pytest
import torch
from helpers.hf_models import compiled, generate, make_model, prompt
from quest_ops import QuestConfig, select_pages
from quest_ops.transformers import enable_quest

CONFIG = QuestConfig(32, 16, sink_pages=0, dense_layers=1)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_selector_that_reads_everything_is_dense(device, backend):
    model, inputs = make_model(device=device), prompt(90, device, padding=(0, 31))
    expected = generate(model, inputs)
    layers = []

    def every_page(layer, q, pages, config):
        layers.append(layer)
        every = torch.arange(pages.page_table.shape[1], dtype=torch.int32, device=q.device)
        return every.expand(*q.shape[:2], pages.k_cache.shape[1], -1)

    cache = enable_quest(model, replace(CONFIG, selector=every_page), max_tokens=128)
    options = {} if backend is None else compiled(backend, device)
    got = generate(model, inputs, cache, **options)
    assert torch.equal(got[0], expected[0])
    assert set(layers) == set(range(1, len(cache.layers)))


def test_quests_own_lists_from_outside(device):
    """The same pages, read and counted; the bounds that a selector reads are its own affair."""
    model, inputs = make_model(device=device), prompt(90, device)

    def own(layer, q, pages, config):
        return select_pages(q, pages.k_bounds, pages.page_table, pages.seq_lens, config, pages.scale, pages.k_scales)

    results = []
    for config in (CONFIG, replace(CONFIG, selector=own)):
        cache = enable_quest(model, config, max_tokens=128)
        cache.start_report()
        results.append((generate(model, inputs, cache), cache.report()))
    (expected, inside), (got, outside) = results
    assert torch.equal(got[0], expected[0])
    assert [x.pages_read for x in outside] == [x.pages_read for x in inside]
    assert 0 < outside[1].bytes_read < inside[1].bytes_read
