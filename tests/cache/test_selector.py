"""QuestConfig.selector: pages and scores from outside, eager, compiled and captured, and their report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.attention_model import HKV, D, Model, S
from helpers.operator_cases import assert_same_bits
from quest_ops import (
    LayerPages,
    QuestConfig,
    attention_report,
    estimate,
    quest_attention,
    select_pages,
    sparse_decode,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

CONFIG = QuestConfig(24, S, sink_pages=0, dense_layers=0)


def own_pages(layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
    _, _, k_bounds, k_scales, page_table, seq_lens, scale = pages
    return select_pages(q, k_bounds, page_table, seq_lens, config, scale, k_scales)


def own_scores(layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
    return estimate(q, pages.k_bounds, pages.page_table, pages.seq_lens, config.page_size, pages.k_scales)


class KeptList:
    """A selector with a state: the pages selected when ``fresh``, kept for later steps, and always the newest page."""

    def __init__(self, device: str) -> None:
        self.lists, self.fresh = torch.full((2, 2, 1, HKV, 3), -1, dtype=torch.int32, device=device), True

    def __call__(self, layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
        if self.fresh:
            self.lists[layer].copy_(own_pages(layer, q, pages, config))
        kept = self.lists[layer]
        newest = ((pages.seq_lens - 1) // config.page_size)[:, None, None, None].expand_as(kept[..., :1])
        held = (kept == newest).any(-1, keepdim=True)
        return torch.cat([kept, torch.where(held, -1, newest)], -1)


@pytest.mark.parametrize("group_reduce", ["max", "soft", "none"])
@pytest.mark.parametrize("selector", [own_pages, own_scores])
def test_quests_own_selection_from_outside_has_the_same_bits(
    device: str, selector: Callable[..., Tensor], group_reduce: str
) -> None:
    """Whole steps, and ragged ones, in which each token is a sequence of its own."""
    config = replace(CONFIG, group_reduce=group_reduce, sink_pages=1)
    inside, outside = Model(device), Model(device)
    for T, lens in ((60, None), (1, None), (4, None), (5, [5, 2]), (1, [0, 1]), (1, None)):
        expected = inside.attend(T, config, lens, scale=0.3)
        assert_same_bits(outside.attend(T, replace(config, selector=selector), lens, scale=0.3), expected)
    outside.check()


def test_lists_of_another_layer(device: str) -> None:
    """Any number of pages, in any order; a selector that keeps the lists of the layer before."""
    lists: list[Tensor] = []

    def lists_of_the_first_layer(layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
        assert (layer, q.shape) == (len(lists), (2, 1, 4, D))
        lists.append(own_pages(layer, q, pages, config).flip(-1) if layer == 0 else lists[0])
        return lists[-1]

    model = Model(device)
    model.attend(60, CONFIG)
    out, cache = model.attend(1, replace(CONFIG, selector=lists_of_the_first_layer)), model.cache
    for layer in range(2):
        k_cache, v_cache, *_ = cache.layer(layer)
        q = model.q[layer].to(device)
        expected, _ = sparse_decode(q, k_cache, v_cache, cache.page_table, cache.seq_lens, lists[0])
        assert_same_bits(out[layer], expected)


def test_only_sparse_layers_call_it(device: str) -> None:
    called: list[tuple[int, int]] = []

    def selector(layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
        called.append((layer, q.shape[1]))
        return own_pages(layer, q, pages, config)

    model = Model(device, layers=3)
    for T in (30, 9, 1, 3):
        model.attend(T, QuestConfig(24, S, dense_layers=1, selector=selector))
    assert called == [(1, 1), (2, 1), (1, 3), (2, 3)]
    Model(device, max_tokens=24).attend(1, replace(CONFIG, selector=selector))
    assert len(called) == 4


def test_a_window_is_a_selector_s_too(device: str) -> None:
    """Forced pages fill the budget, so that Quest would read no bounds: the selector is asked all the same."""
    model, other = Model(device), Model(device)
    config = QuestConfig(16, S, 1, 1, 0)
    first_pages = torch.tensor([0, 2, 5], dtype=torch.int32, device=device).expand(2, 1, HKV, 3)
    for m in (model, other):
        m.attend(60, config)
    outs = [model.attend(1, replace(config, selector=lambda *_: first_pages)), other.attend(1, config)]
    assert not torch.equal(*outs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(device: str, backend: str) -> None:
    """The selector is traced: one graph for steps that select and one for steps that do not."""
    torch._dynamo.reset()
    models = [Model(device) for _ in range(2)]
    selectors = [KeptList(device) for _ in models]
    eager, compiled = (replace(CONFIG, selector=selector) for selector in selectors)
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([quest_attention(q[i], k[i], v[i], models[1].cache, i, compiled) for i in range(2)])

    for model in models:
        model.attend(41, CONFIG)
    differs = False
    for i in range(12):
        for selector in selectors:
            selector.fresh = i % 4 == 0
        expected = models[0].attend(1, eager)
        inputs = models[1].inputs(1)
        models[1].cache.advance(1)
        assert_same_bits(step(*inputs), expected)
        assert torch.equal(selectors[0].lists, selectors[1].lists)
        differs = differs or bool((selectors[0].lists[0] != selectors[0].lists[1]).any())
    assert counter.frame_count == 2
    assert differs  # the layers keep lists of their own
    models[1].check()


@pytest.mark.gpu
def test_captured() -> None:
    models = [Model("cuda") for _ in range(2)]
    selectors = [KeptList("cuda") for _ in models]
    eager, captured = (replace(CONFIG, selector=selector) for selector in selectors)
    q, k, v = (torch.zeros(2, 2, 1, heads, D, device="cuda") for heads in (4, HKV, HKV))

    def step() -> Tensor:
        models[1].cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], models[1].cache, i, captured) for i in range(2)])

    for model in models:
        model.attend(41, CONFIG)
        model.attend(1, replace(CONFIG, selector=own_scores))  # loads the kernels
    models[1].cache.reserve(20)
    graphs = {}
    for fresh in (True, False):
        selectors[1].fresh, graph = fresh, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs[fresh] = graph, step()
    for i in range(12):
        selectors[0].fresh = i % 4 == 0
        expected = models[0].attend(1, eager)
        for static, new in zip((q, k, v), models[1].inputs(1), strict=True):
            static.copy_(new)
        graph, out = graphs[i % 4 == 0]
        graph.replay()
        assert_same_bits(out, expected)
    models[1].cache.sync_lengths()
    models[1].check()


def test_the_report_counts_the_pages_read_and_no_bounds(device: str) -> None:
    model = Model(device)
    model.attend(60, CONFIG)
    model.cache.start_report()
    chosen = torch.tensor([0, 3, 5, 7, -1], dtype=torch.int32, device=device).expand(2, 1, HKV, 5)
    config = replace(CONFIG, selector=lambda *_: chosen)
    model.attend(1, config)
    page = 2 * S * D * 4
    for layer in attention_report(model.cache, config):
        assert layer.plan.reason == "pages of config.selector, of 96 tokens"
        assert (layer.steps, layer.pages_read, layer.pages_held) == (1, 2 * HKV * 4, 2 * HKV * 8)
        assert layer.bytes_read == layer.pages_read * page


def test_what_is_neither_pages_nor_scores_is_refused(device: str) -> None:
    model = Model(device)
    model.attend(60, CONFIG)
    for wrong in (torch.int64, torch.float16):
        config = replace(CONFIG, selector=lambda *_, wrong=wrong: torch.zeros(2, 1, HKV, 3, dtype=wrong, device=device))
        with pytest.raises(ValueError, match=f"selector must return int32 pages or float32 scores, got {wrong}"):
            model.attend(1, config)
        model.crop(60)
        model.k, model.v = ([x[:, :60] for x in tokens] for tokens in (model.k, model.v))
    with pytest.raises(ValueError, match="selector must be a function or None, got 'mean'"):
        QuestConfig(selector="mean")  # type: ignore[arg-type]
