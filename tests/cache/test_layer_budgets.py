"""A budget for each layer: eager, compiled and in a CUDA graph. Exported steps are in test_export.py."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention_model import BOUNDS, HKV, D, Model, S
from helpers.cache_model import same_snapshot, snapshot
from helpers.operator_cases import assert_same_bits
from quest_ops import LayerPages, QuestConfig, attention_path, attention_report, quest_attention, select_pages
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

# Layers 1 and 4 are dense; the others read 2, 5 and 3 pages.
BUDGETS = (2 * S, 0, 5 * S, 3 * S, None)


def config_of(bounds: str = "int4", **changes: Any) -> QuestConfig:
    return QuestConfig(BUDGETS, S, bounds=bounds, **changes)  # type: ignore[arg-type]


def alone(config: QuestConfig, layer: int) -> QuestConfig:
    """The configuration of one layer, made without a list."""
    budget = BUDGETS[layer]
    return replace(config, budget=budget or 1024, dense_layers=0 if budget else 9)


@BOUNDS
@pytest.mark.parametrize("group_reduce", ["max", "none"])
def test_each_layer_reads_its_budget(device: str, bounds: str, group_reduce: str) -> None:
    """Against the reference, and bit for bit as a configuration of one number does in each layer."""
    model, other = (Model(device, layers=5, bounds=bounds) for _ in range(2))
    config = config_of(bounds, group_reduce=group_reduce)
    paths = [attention_path(model.cache, layer, config) for layer in range(5)]
    assert paths == ["sparse", "dense", "sparse", "sparse", "dense"]
    for T, lens in ((70, [70, 31]), (1, None), (3, [3, 1]), (8, None), (1, None)):
        out = model.attend(T, config, lens)
        model.assert_right(out, config)
        q, k, v = other.inputs(T, lens)
        other.cache.advance(T, lens)
        for i in range(5):
            assert_same_bits(quest_attention(q[i], k[i], v[i], other.cache, i, alone(config, i)), out[i])
    model.check()
    assert same_snapshot(snapshot(model.cache), snapshot(other.cache))


def test_the_report_has_a_budget_for_each_layer(device: str) -> None:
    model, config = Model(device, layers=5), config_of()
    model.attend(80, config)
    model.cache.start_report()
    model.attend(1, config)
    report = attention_report(model.cache, config)
    assert [x.pages_read for x in report] == [2 * 2 * pages for pages in (2, 11, 5, 3, 11)]
    assert [x.plan.reason for x in report] == [
        "at most 16 tokens of 96",
        "a budget of 0",
        "at most 40 tokens of 96",
        "at most 24 tokens of 96",
        "a budget of 0",
    ]


def test_a_selector_gets_its_layers_configuration(device: str) -> None:
    seen: dict[int, QuestConfig] = {}

    def selector(layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
        seen[layer] = config
        return select_pages(q, pages.k_bounds, pages.page_table, pages.seq_lens, config, pages.scale, pages.k_scales)

    model, other, config = Model(device, layers=5), Model(device, layers=5), config_of(selector=selector)
    model.attend(70, config), other.attend(70, config_of())
    assert_same_bits(model.attend(1, config), other.attend(1, config_of()))
    assert {layer: c.num_pages for layer, c in seen.items()} == {0: 2, 2: 5, 3: 3}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
def test_one_compiled_step_serves_all_layers(device: str, backend: str, inside: bool) -> None:
    torch._dynamo.reset()
    config, counter = config_of(), CompileCounterWithBackend(backend)
    eager, compiled = (Model(device, layers=5) for _ in range(2))

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if inside:
            compiled.cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], compiled.cache, i, config) for i in range(5)])

    step = torch.compile(layers, fullgraph=True, backend=counter)
    for model in (eager, compiled):
        model.attend(29, config, [29, 3])
    compiled.cache.reserve(40)
    for _ in range(20):
        expected = eager.attend(1, config)
        inputs = compiled.inputs(1)
        if not inside:
            compiled.cache.advance(1)
        assert_same_bits(step(*inputs), expected)
    assert counter.frame_count == 1
    if inside:
        compiled.cache.sync_lengths()
    compiled.check()


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cuda_graph_serves_all_layers(inside: bool, dtype: torch.dtype) -> None:
    config = config_of()
    eager, captured = (Model("cuda", layers=5, dtype=dtype) for _ in range(2))
    for model in (eager, captured):
        model.attend(29, config, [29, 3])
        model.attend(1, config)
    captured.cache.reserve(40)
    q, k, v = (torch.zeros(5, 2, 1, heads, D, dtype=dtype, device="cuda") for heads in (4, HKV, HKV))
    graph = torch.cuda.CUDAGraph()
    if not inside:
        captured.cache.advance(1)
    with torch.cuda.graph(graph):
        if inside:
            captured.cache.advance(1)
        out = torch.stack([quest_attention(q[i], k[i], v[i], captured.cache, i, config) for i in range(5)])
    for i in range(20):
        expected = eager.attend(1, config)
        for static, new in zip((q, k, v), captured.inputs(1), strict=True):
            static.copy_(new)
        if not inside and i:
            captured.cache.advance(1)
        graph.replay()
        assert_same_bits(out, expected)
    captured.cache.sync_lengths()
    captured.check()


def test_a_list_is_kept_as_a_tuple() -> None:
    config = config_of()
    assert config.budget == (16, 0, 40, 24, 0)
    assert config == QuestConfig([16, 0, 40, 24, 0], S, dense_layers=0)
    assert hash(config) == hash(config_of())
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), replace(config)):
        assert other == config
        assert [other.at(i).num_pages for i in (0, 2, 3)] == [2, 5, 3]
    assert [config.is_dense(i) for i in range(5)] == [False, True, False, False, True]
    assert config.at(0) == QuestConfig(16, S, dense_layers=0)


def test_one_number_has_two_dense_layers_by_default() -> None:
    config = QuestConfig()
    assert (config.dense_layers, config.at(7)) == (2, config)
    assert QuestConfig(dense_layers=0).dense_layers == 0


def test_every_layer_may_be_dense() -> None:
    config = QuestConfig([0, None], S)
    assert [config.is_dense(layer) for layer in range(2)] == [True, True]


def test_a_whole_number_of_another_type() -> None:
    numpy = pytest.importorskip("numpy")
    for budget in (numpy.int64(64), [numpy.int64(64)]):
        config = QuestConfig(budget)
        assert config.at(0).num_pages == 4
        assert type(config.at(0).budget) is int


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": []}, "budget must have a number for each layer, got an empty list"),
        ({"budget": [64, 24]}, "budget of layer 1 must be 0 or a multiple of page_size, 16, got 24"),
        ({"budget": [-16, 64]}, "budget of layer 0 must be 0 or a multiple of page_size, 16, got -16"),
        ({"budget": [64, True]}, "budget of layer 1 must be a whole number or None, got True"),
        ({"budget": [64, 64.0]}, "budget of layer 1 must be a whole number or None, got 64.0"),
        ({"budget": ["64"]}, "budget of layer 0 must be a whole number or None, got '64'"),
        ({"budget": [64, 16]}, r"at most the 1 pages of the budget of layer 1, got 1 \+ 1"),
        ({"budget": [64, 64], "dense_layers": 2}, "dense_layers must be 0 or left out with a list of budgets"),
        ({"budget": "64"}, "budget must be a whole number, or a list with one for each layer, got '64'"),
        ({"budget": 64.0}, "budget must be a whole number, or a list with one for each layer, got 64.0"),
        ({"budget": True}, "budget must be a whole number, or a list with one for each layer, got True"),
        ({"budget": None}, "budget must be a whole number, or a list with one for each layer, got None"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestConfig(**arguments)


def test_a_list_for_another_model_is_named_before_anything_is_written(device: str) -> None:
    model, config = Model(device, layers=3), config_of()
    q, k, v = (x[0] for x in model.inputs(1))
    model.cache.advance(1)
    before = snapshot(model.cache)
    message = r"config.budget must be .* one for each of 3 layers, got 5 of them"
    with pytest.raises(ValueError, match=message):
        quest_attention(q, k, v, model.cache, 0, config)
    with pytest.raises(ValueError, match=message):
        attention_path(model.cache, 0, config)
    assert same_snapshot(before, snapshot(model.cache))
    for layer in (-1, 5):
        with pytest.raises(ValueError, match="layer must be 0 to 4, as config.budget has it"):
            config.at(layer)
    with pytest.raises(ValueError, match=r"the budget is a list: .* one layer, config.at\(layer\)"):
        config.num_pages  # noqa: B018
