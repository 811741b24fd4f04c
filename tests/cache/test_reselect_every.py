"""QuestConfig.reselect_every: pages of one selection for several steps, against the same rule as a selector."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention_model import HKV, D, Model, S
from helpers.kept_lists import lists_to_read
from helpers.operator_cases import assert_same_bits
from quest_ops import (
    CacheView,
    LayerPages,
    PagedKVCache,
    QuestConfig,
    attention_report,
    quest_attention,
    select_pages,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

EVERY = 3
CONFIG = QuestConfig(32, S, dense_layers=1, reselect_every=EVERY)


class Rule:
    """The rule of reselect_every as a selector. ``step`` counts the steps of one token since another change."""

    def __init__(self) -> None:
        self.step, self.lists = -1, {}  # type: int, dict[int, Tensor]
        self.kept = 0  # sequences of the layers that kept their lists

    def begin(self, T: int, lens: list[int] | None) -> None:
        self.step = self.step + 1 if T == 1 and lens is None else -1

    def __call__(self, layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
        _, _, k_bounds, k_scales, page_table, seq_lens, scale = pages
        fresh = select_pages(q, k_bounds, page_table, seq_lens, config, scale, k_scales)
        if self.step <= 0:
            self.lists[layer] = fresh
            return fresh
        self.lists[layer], keeps = lists_to_read(fresh, self.lists[layer], seq_lens, S, EVERY)
        self.kept += int(keeps.sum())
        return self.lists[layer]


class Pair:
    """A model with reselect_every, and one with the rule as a selector."""

    def __init__(self, device: str, config: QuestConfig = CONFIG, **options: Any) -> None:
        self.config, self.rule = config, Rule()
        self.kept = Model(device, kept_pages=config.kept_pages, bounds=config.bounds, **options)
        self.other = Model(device, bounds=config.bounds, **options)
        self.selecting = replace(config, reselect_every=1, selector=self.rule)

    def expected(self, T: int, lens: list[int] | None = None) -> Tensor:
        self.rule.begin(T, lens)
        return self.other.attend(T, self.selecting, lens)

    def step(self, T: int, lens: list[int] | None = None) -> None:
        assert_same_bits(self.kept.attend(T, self.config, lens), self.expected(T, lens))

    def change(self, name: str, *arguments: int) -> None:
        for model in (self.kept, self.other):
            getattr(model, name, getattr(model.cache, name))(*arguments)
        self.rule.step = -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_sequences_read_every_page(device: str, dtype: torch.dtype) -> None:
    """With dense_below, and from its end on as without it: one sequence of two crosses the limit."""
    short, config = 7 * S, replace(CONFIG, budget=2 * S)
    configs = (replace(config, dense_below=short), config, QuestConfig(1024, S))
    models = [Model(device, kept_pages=short // S, dtype=dtype) for _ in configs]
    seen = set()
    for T, lens in ((short - 4, [short - 4, 20]), *[(1, None)] * 20):
        limited, sparse, dense = (m.attend(T, c, lens) for m, c in zip(models, configs, strict=True))
        if T > 1:
            continue
        for b, length in enumerate(models[0].cache.seq_lens.tolist()):
            assert_same_bits(limited[:, b], (dense if length <= short else sparse)[:, b])
            seen.add((b, length <= short, torch.equal(sparse[:, b], dense[:, b])))
    assert seen >= {(0, True, False), (0, False, False), (1, True, False)}


@pytest.mark.parametrize("group_reduce", ["max", "sum", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_every_kind(device: str, group_reduce: Any, dtype: torch.dtype) -> None:
    pair = Pair(device, replace(CONFIG, group_reduce=group_reduce), dtype=dtype)
    steps: tuple[tuple[int, list[int] | None], ...] = (
        (26, None),
        *[(1, None)] * 11,  # from fewer pages than the budget to more
        (3, None),
        *[(1, None)] * 5,
        (2, [2, 0]),
        (1, [1, 0]),
        *[(1, None)] * 7,
    )
    for T, lens in steps:
        pair.step(T, lens)
    assert pair.rule.step == 6 and pair.rule.kept > 10


def test_after_a_change_of_the_sequences_all_select(device: str) -> None:
    pair = Pair(device, max_tokens=128)
    pair.step(70)
    for name, arguments in (("crop", (66,)), ("fork", (0, 1)), ("free", (1,)), ("reset", ())):
        for _ in range(EVERY + 2):
            pair.step(1)
        assert pair.rule.kept > 0
        pair.change(name, *arguments)
        pair.rule.kept = 0
    pair.step(60)
    for _ in range(4):
        pair.step(1)


def test_it_differs_from_a_selection_in_each_step(device: str) -> None:
    kept, each = Model(device, kept_pages=4), Model(device)
    outs = []
    for model, config in ((kept, CONFIG), (each, replace(CONFIG, reselect_every=1))):
        model.attend(88, config)
        outs.append([model.attend(1, config)[1] for _ in range(8)])
    same = [torch.equal(x, y) for x, y in zip(*outs, strict=True)]
    assert same == [True, False, False] * 2 + [True, False]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps(device: str, backend: str) -> None:
    """A single graph serves steps that select and steps that do not, for any batch."""
    torch._dynamo.reset()
    counter, config = CompileCounterWithBackend(backend), replace(CONFIG, dense_layers=0)

    def layers(q: Tensor, k: Tensor, v: Tensor, cache: PagedKVCache) -> Tensor:
        return torch.stack([quest_attention(q[i], k[i], v[i], cache, i, config) for i in range(2)])

    step = torch.compile(layers, fullgraph=True, backend=counter)
    pair = Pair(device, config)
    pair.step(50)
    for _ in range(8):
        expected, inputs = pair.expected(1), pair.kept.inputs(1)
        pair.kept.cache.advance(1)
        assert_same_bits(step(*inputs, pair.kept.cache), expected)
    assert counter.frame_count == 1
    pair.kept.check()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_advance(device: str, backend: str) -> None:
    torch._dynamo.reset()
    pair = Pair(device)

    @torch.compile(fullgraph=True, backend=backend)
    def step(q: Tensor, k: Tensor, v: Tensor, cache: PagedKVCache) -> Tensor:
        cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], cache, i, CONFIG) for i in range(2)])

    pair.step(50)
    pair.kept.cache.reserve(8)
    for _ in range(8):
        expected = pair.expected(1)
        assert_same_bits(step(*pair.kept.inputs(1), pair.kept.cache), expected)


@pytest.mark.gpu
def test_in_a_graph() -> None:
    pair = Pair("cuda", dtype=torch.bfloat16)
    pair.step(60)
    pair.step(1)
    pair.expected(1)
    buffers, captured = pair.kept.inputs(1), pair.kept.cache
    captured.reserve(20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.advance(1)
        out = torch.stack([quest_attention(*(x[i] for x in buffers), captured, i, CONFIG) for i in range(2)])
    graph.replay()
    for _ in range(10):
        expected = pair.expected(1)
        for buffer, new in zip(buffers, pair.kept.inputs(1), strict=True):
            buffer.copy_(new)
        graph.replay()
        assert_same_bits(out, expected)


def test_a_view_of_the_tensors_and_a_copy(device: str) -> None:
    pair = Pair(device)
    pair.step(60)
    pair.step(1)
    cache = pair.kept.cache
    cache.reserve(1)
    twin = copy.deepcopy(cache)
    tensors = (cache.k_cache, cache.v_cache, cache.k_bounds, cache.page_table, cache.seq_lens, cache.k_scales)
    view = CacheView(*tensors, kept=cache.state.kept)
    expected, (q, k, v) = pair.expected(1), pair.kept.inputs(1)
    for each in (twin, view):
        each.advance(1)
        out = torch.stack([quest_attention(q[i], k[i], v[i], each, i, CONFIG) for i in range(2)])
        assert_same_bits(out, expected)


def test_an_exported_step(device: str) -> None:
    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], kept: Any) -> Tensor:
            view = CacheView(*tensors, kept=kept)
            view.advance(1)
            return torch.stack([quest_attention(q[i], k[i], v[i], view, i, CONFIG) for i in range(2)])

    pair = Pair(device)
    pair.step(60)
    cache = pair.kept.cache
    tensors = [cache.k_cache, cache.v_cache, cache.k_bounds, cache.page_table, cache.seq_lens, cache.k_scales]
    cache.reserve(6)
    program = None
    for _ in range(5):
        expected, inputs = pair.expected(1), pair.kept.inputs(1)
        if program is None:
            program = torch.export.export(Step(), (*inputs, tensors, cache.state.kept)).module()
        assert_same_bits(program(*inputs, tensors, cache.state.kept), expected)


def test_each_layer_has_its_budget(device: str) -> None:
    config = QuestConfig([0, 16, 32], S, reselect_every=EVERY)
    assert config.kept_pages == 4
    pair = Pair(device, config, layers=3)
    for T in (60, 1, 1, 1, 1, 1):
        pair.step(T)


def test_the_report_counts_bounds_where_pages_were_selected(device: str) -> None:
    model = Model(device, batch=2, kept_pages=4, bounds="int8")
    config = replace(CONFIG, bounds="int8")
    model.attend(81, config)
    model.cache.start_report()
    for _ in range(4):  # the first after a prefill selects, and the third, the fourth token of its page
        model.attend(1, config)
    _, sparse = attention_report(model.cache, config)
    kv, bounds = 2 * S * D * 4, 2 * D + 4
    assert sparse.pages_read == 4 * 2 * HKV * 4
    assert sparse.bytes_read == 2 * HKV * (4 * 4 * kv + 2 * 11 * bounds)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reselect_every": 0}, "reselect_every must be at least 1, got 0"),
        ({"reselect_every": 2.5}, "reselect_every must be a whole number, got 2.5"),
        ({"group_reduce": "none"}, "group_reduce must be max, sum or soft with reselect_every, 3, got 'none'"),
        ({"recent_pages": 0}, "recent_pages must be at least 1 with reselect_every, 3, got 0"),
        ({"candidates": 64}, "candidates must be 0 with reselect_every, 3, got 64"),
        ({"dense_below": 65}, "dense_below must be a multiple of page_size, 8, with reselect_every, 3, got 65"),
        ({"selector": max}, "selector must be None with reselect_every, 3, got"),
    ],
)
def test_bad_configurations(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuestConfig(**{"budget": 24, "page_size": S, "reselect_every": EVERY, **options})


@pytest.mark.parametrize("kept_pages", [0, 3])
def test_a_cache_without_room_for_the_lists(kept_pages: int) -> None:
    model = Model("cpu", kept_pages=kept_pages)
    q, k, v = (x[1] for x in model.inputs(1))
    sentence = (
        f"config.reselect_every must be 1 with a cache that keeps lists of {kept_pages} pages, got 3: "
        f"make the cache with kept_pages=config.kept_pages, 4"
    )
    with pytest.raises(ValueError, match=sentence):
        quest_attention(q, k, v, model.cache, 1, CONFIG)
    with pytest.raises(ValueError, match="kept_pages must be at least 0, got -1"):
        PagedKVCache(1, 2, 64, max_tokens=10, kept_pages=-1)


def test_a_saved_configuration_has_it(tmp_path: Any) -> None:
    CONFIG.save(tmp_path / "quest.json")
    assert QuestConfig.load(tmp_path / "quest.json") == CONFIG
