"""QuestConfig.candidates: a second selection among the pages of the first, by the codes of their keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention_model import BOUNDS, HKV, D, Model, S
from helpers.operator_cases import assert_same_bits
from quest_ops import CacheView, PagedKVCache, QuestConfig, attention_report, ops, quest_attention, select_pages
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

CONFIG = QuestConfig(24, S, dense_layers=1, candidates=48)


def assert_codes(cache: PagedKVCache) -> None:
    """The codes of every token are those of its key, whatever came before."""
    tokens = int(cache.seq_lens.max())
    for layer in range(cache.num_layers):
        k_cache, codes = cache.layer(layer).k_cache, cache.state.codes(layer)
        assert codes is not None
        for b, length in enumerate(cache.seq_lens.tolist()):
            table = cache.page_table[b : b + 1].clamp(min=0)
            keys = k_cache[table[0].long()].transpose(1, 2).flatten(0, 1)[None, :length]
            fresh = tuple(torch.zeros_like(x) for x in codes)
            ops.append_codes(keys, *fresh, table, torch.zeros(1, dtype=torch.int32, device=table.device))
            for actual, expected in zip(codes, fresh, strict=True):
                actual, expected = (x[table[0].long()].transpose(1, 2).flatten(0, 1) for x in (actual, expected))
                assert_same_bits(actual[:length], expected[:length])
    assert tokens > 0


@pytest.mark.parametrize("group_reduce", ["max", "sum", "soft", "none"])
@BOUNDS
def test_it_is_the_references_selection(device: str, group_reduce: Any, bounds: Any) -> None:
    model = Model(device, heads=6, bounds=bounds, codes=True)
    config = replace(CONFIG, group_reduce=group_reduce, bounds=bounds)
    for T in (80, 1, 3, 1, 8, 1):
        model.assert_right(model.attend(T, config), config)
        assert_codes(model.cache)


def test_ragged_steps(device: str) -> None:
    model = Model(device, batch=3, codes=True)
    steps = ((70, [70, 0, 53]), (7, [0, 7, 4]), (1, [1, 0, 1]), (6, [6, 5, 0]), (1, [1, 1, 1]))
    for T, lens in steps:
        model.assert_right(model.attend(T, CONFIG, lens), CONFIG)
        assert_codes(model.cache)


def test_candidates_matter(device: str) -> None:
    """Two selections choose otherwise than one, and all candidates choose by the codes alone."""
    model = Model(device, codes=True)
    model.attend(90, CONFIG)
    q = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0)).to(device)
    k_bounds, k_scales = model.cache.layer(1)[2:]
    codes = model.cache.state.codes(1)
    chosen = [
        select_pages(q, k_bounds, model.cache.page_table, model.cache.seq_lens, config, None, k_scales, codes)
        for config in (replace(CONFIG, candidates=0), CONFIG, replace(CONFIG, candidates=96))
    ]
    assert not torch.equal(chosen[0], chosen[1])
    all_pages = torch.arange(12, dtype=torch.int32, device=device).expand(2, HKV, -1).contiguous()
    assert codes is not None
    scores = ops.rerank_pages(q, *codes, model.cache.page_table, model.cache.seq_lens, all_pages)
    expected = ops.topk_pages(scores, model.cache.seq_lens, S, 3, HKV, "max", 1, 1)
    assert torch.equal(chosen[2], expected)


def test_short_sequences_are_dense_bit_for_bit(device: str) -> None:
    """Within the budget, and within dense_below."""
    for config in (CONFIG, replace(CONFIG, dense_below=40)):
        sparse, dense = Model(device, codes=True), Model(device, codes=True)
        dense_config = replace(CONFIG, dense_layers=2)
        length = 24 if config is CONFIG else 40
        for T in (length - 3, 1, 1, 1):
            assert_same_bits(sparse.attend(T, config), dense.attend(T, dense_config))
        sparse.attend(40, config), dense.attend(40, dense_config)
        assert not torch.equal(sparse.attend(1, config), dense.attend(1, dense_config))


def test_codes_follow_their_pages(device: str) -> None:
    """Through crops, forks, copies on write, and steps with one selection."""
    model = Model(device, batch=2, codes=True, num_pages=24)
    one = replace(CONFIG, candidates=0)
    cache = model.cache
    model.attend(43, CONFIG)
    cache.crop(37)
    cache.fork(0, 1)
    layers = range(cache.num_layers)
    for T, config in ((1, CONFIG), (1, one), (4, one), (9, CONFIG), (1, CONFIG)):
        q = torch.randn(len(layers), 2, T, model.heads, D, device=device)
        k, v = (torch.randn(len(layers), 2, T, HKV, D, device=device) for _ in "kv")
        cache.advance(T)
        for i in layers:
            quest_attention(q[i], k[i], v[i], cache, i, config)
        assert_codes(cache)
    cache.free(1)
    assert_codes(cache)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps(device: str, backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (Model(device, codes=True) for _ in range(2))
    counter = CompileCounterWithBackend(backend)

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([quest_attention(q[i], k[i], v[i], compiled.cache, i, CONFIG) for i in range(2)])

    step = torch.compile(layers, fullgraph=True, backend=counter)
    for model in (eager, compiled):
        model.attend(60, CONFIG, [60, 33])
        model.attend(1, CONFIG)
    for _ in range(12):
        expected = eager.attend(1, CONFIG)
        inputs = compiled.inputs(1)
        compiled.cache.advance(1)
        assert_same_bits(step(*inputs), expected)
    assert counter.frame_count == 1
    compiled.check()
    assert_codes(compiled.cache)


@pytest.mark.gpu
def test_in_a_graph() -> None:
    eager, captured = (Model("cuda", codes=True) for _ in range(2))
    for model in (eager, captured):
        model.attend(60, CONFIG)
        model.attend(1, CONFIG)
    eager.attend(1, CONFIG)
    buffers = captured.inputs(1)
    captured.cache.reserve(20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.cache.advance(1)
        out = torch.stack([quest_attention(*(x[i] for x in buffers), captured.cache, i, CONFIG) for i in range(2)])
    graph.replay()
    for _ in range(10):
        expected = eager.attend(1, CONFIG)
        for buffer, new in zip(buffers, captured.inputs(1), strict=True):
            buffer.copy_(new)
        graph.replay()
        assert_same_bits(out, expected)
    captured.cache.sync_lengths()
    assert_codes(captured.cache)


def test_a_view_of_the_tensors(device: str) -> None:
    model, other = Model(device, codes=True), Model(device, codes=True)
    for each in (model, other):
        each.attend(60, CONFIG)
    cache = model.cache
    tensors = (cache.k_cache, cache.v_cache, cache.k_bounds, cache.page_table, cache.seq_lens, cache.k_scales)
    view = CacheView(*tensors, k_codes=cache.k_codes, code_scales=cache.code_scales)
    cache.reserve(1)
    expected, (q, k, v) = other.attend(1, CONFIG), model.inputs(1)
    view.advance(1)
    assert_same_bits(torch.stack([quest_attention(q[i], k[i], v[i], view, i, CONFIG) for i in range(2)]), expected)


def test_the_report_counts_codes(device: str) -> None:
    model = Model(device, batch=1, codes=True, bounds="int8")
    config = replace(CONFIG, bounds="int8")
    model.attend(81, config)
    model.cache.start_report()
    model.attend(1, config)
    dense, sparse = attention_report(model.cache, config)
    assert dense.share == 1
    kv, bounds, codes = 2 * S * D * 4, 2 * D + 4, S * (D // 4 + 4)
    assert sparse.bytes_read == HKV * (3 * kv + 11 * bounds + 6 * codes)
    assert sparse.bytes_dense == HKV * 11 * kv


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"candidates": -1}, "candidates must be at least 0, got -1"),
        ({"candidates": 1.5}, "candidates must be a whole number, got 1.5"),
        ({"candidates": 24}, "candidates must be 0 or pages more than the budget, 24, got 24"),
        ({"candidates": 31}, "candidates must be 0 or pages more than the budget, 24, got 31"),
        ({"budget": [0, 64, 24], "candidates": 64}, "candidates must be 0 or pages more than the budget, 64, got 64"),
        ({"candidates": 64, "selector": math.hypot}, "candidates must be 0 with a selector, got 64"),
    ],
)
def test_bad_candidates(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuestConfig(**{"budget": 24, "page_size": S, **options})


@pytest.mark.parametrize("T", [1, 4])
def test_a_refused_step_writes_no_codes(T: int) -> None:
    model = Model("cpu", codes=True)
    one = replace(CONFIG, candidates=0)
    model.attend(60, one)
    q, k, v = (x[1] for x in model.inputs(T))
    model.cache.advance(T)
    model.cache.page_table[1, 7] = 10**6
    before = [x.clone() for x in model.cache.state.codes(1) or ()]
    with pytest.raises(RuntimeError):
        quest_attention(q, k, v, model.cache, 1, one)
    for x, y in zip(model.cache.state.codes(1) or (), before, strict=True):
        assert_same_bits(x, y)


def test_a_window_has_no_candidates(device: str) -> None:
    """Every page of the budget is forced, so nothing is scored."""
    model, other = Model(device, codes=True), Model(device)
    window = replace(CONFIG, sink_pages=1, recent_pages=2)
    for T in (70, 1):
        out, expected = model.attend(T, window), other.attend(T, replace(window, candidates=0))
        assert_same_bits(out, expected)
    assert window.candidate_pages == 0


def test_a_cache_without_codes_refuses_candidates() -> None:
    model = Model("cpu")
    q, k, v = (x[0] for x in model.inputs(1))
    sentence = "config.candidates must be 0 with a cache that has no codes, got 48: make the cache with codes=True"
    with pytest.raises(ValueError, match=sentence):
        quest_attention(q, k, v, model.cache, 0, CONFIG)
    k_bounds, k_scales = model.cache.layer(0)[2:]
    with pytest.raises(ValueError, match=r"codes must be given with config.candidates, got None"):
        select_pages(q[:, 0], k_bounds, model.cache.page_table, model.cache.seq_lens, CONFIG, None, k_scales)
    with pytest.raises(ValueError, match="codes must be one of False, True, got 2"):
        PagedKVCache(1, 2, 64, max_tokens=10, codes=2)  # type: ignore[arg-type]


def test_a_saved_configuration_has_them(tmp_path: Any) -> None:
    CONFIG.save(tmp_path / "quest.json")
    assert QuestConfig.load(tmp_path / "quest.json") == CONFIG
