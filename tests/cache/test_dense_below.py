"""dense_below: short sequences are read whole beside sparse ones, decided on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.attention_model import BOUNDS, HKV, D, Model, S
from helpers.operator_cases import assert_same_bits
from quest_ops import LayerPages, QuestConfig, attention_path, attention_report, quest_attention, select_pages
from quest_ops.attention import choose_pages
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

LIMIT = 45
# In the last layer the budget holds the limit, so it has no effect there.
CONFIG = QuestConfig([2 * S, 3 * S, 0, 2 * S, 6 * S], S, sink_pages=0, dense_below=LIMIT)
SPARSE, DENSE = replace(CONFIG, dense_below=0), QuestConfig(1024, S, dense_layers=9)
LAYERS = 5


def pages_of_selector(
    layer: int,
    q: Tensor,
    pages: LayerPages,
    config: QuestConfig,
) -> Tensor:
    config = replace(config, selector=None, dense_below=0)
    return select_pages(q, pages.k_bounds, pages.page_table, pages.seq_lens, config, pages.scale, pages.k_scales)


def scores_of_selector(layer: int, q: Tensor, pages: LayerPages, config: QuestConfig) -> Tensor:
    scores = torch.arange(pages.page_table.shape[1], dtype=torch.float32, device=q.device)
    return scores.remainder(5).expand(*q.shape[:3], -1).contiguous()


def assert_short_rows_dense(models: list[Model], outs: list[Tensor], lens: list[int] | None = None) -> int:
    """Outputs of CONFIG, SPARSE and DENSE, [L, B, T, Hq, D]. Returns the rows that are short."""
    mixed, sparse, dense = outs
    lengths = models[0].cache.seq_lens.tolist()
    for b, length in enumerate(lengths):
        real = slice(0, None if lens is None else lens[b])
        assert_same_bits(mixed[:, b, real], (dense if length <= LIMIT else sparse)[:, b, real])
    return sum(length <= LIMIT for length in lengths)


@BOUNDS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group_reduce": "none"},
        {"group_reduce": "soft"},
        {"selector": pages_of_selector},
        {"selector": scores_of_selector},
        {"budget": [2 * S] * 5, "sink_pages": 1},  # a window: every page of the budget is forced
    ],
    ids=["max", "none", "soft", "pages of a selector", "scores of a selector", "window"],
)
def test_short_rows_are_dense_and_long_rows_sparse_bit_for_bit(
    device: str, bounds: str, changes: dict[str, Any]
) -> None:
    models = [Model(device, layers=LAYERS, batch=4, bounds=bounds) for _ in range(3)]
    configs = [replace(config, bounds=bounds, **changes) for config in (CONFIG, SPARSE)]
    configs[1] = replace(configs[1], dense_below=0)
    configs += [replace(DENSE, bounds=bounds)]
    short = []
    for T, lens in ((60, [60, 39, 20, 0]), (1, None), (3, None), (1, None), (1, None), (8, None), (1, None)):
        outs = [model.attend(T, config, lens) for model, config in zip(models, configs, strict=True)]
        if T <= 8:
            short.append(assert_short_rows_dense(models, outs))
            assert not torch.equal(outs[1], outs[2])
    assert short == [3, 3, 3, 3, 2, 2]  # the second row crosses the limit


def test_ragged_steps_decide_for_each_token(device: str) -> None:
    models = [Model(device, layers=LAYERS, batch=3) for _ in range(3)]
    for T, lens in ((50, [50, 43, 10]), (4, [1, 4, 0])):
        outs = [m.attend(T, c, lens) for m, c in zip(models, (CONFIG, SPARSE, DENSE), strict=True)]
    mixed, sparse, dense = outs
    assert_same_bits(mixed[:, 0], sparse[:, 0])
    assert_same_bits(mixed[:, 1, :2], dense[:, 1, :2])  # tokens 44 and 45
    assert_same_bits(mixed[:, 1, 2:], sparse[:, 1, 2:])
    assert (mixed[:, 2] == 0).all()


def test_lists_of_a_selector(device: str) -> None:
    """A short row lists the pages that each of its tokens sees, a longer one those of the selector."""
    model = Model(device, batch=2)
    model.attend(52, QuestConfig(2 * S, S), [39, 52])
    k_cache, v_cache, k_bounds, k_scales = model.cache.layer(0)
    chosen = torch.tensor([1, 4], dtype=torch.int32, device=device).expand(2, 3, HKV, 2)
    config = QuestConfig(2 * S, S, dense_below=6 * S, selector=lambda *_: chosen)
    pages = LayerPages(k_cache, v_cache, k_bounds, k_scales, model.cache.page_table, model.cache.seq_lens, 1.0)
    found = choose_pages(0, torch.zeros(2, 3, 4, D, device=device), pages, config)
    # 39 tokens are 5 pages; the last three tokens see 37, 38 and 39.
    assert found[0].tolist() == [[[0, 1, 2, 3, 4, -1]] * HKV] * 3
    assert found[1].tolist() == [[[1, 4, -1, -1, -1, -1]] * HKV] * 3


def test_a_cache_that_stays_below_is_dense(device: str) -> None:
    cache = Model(device, layers=LAYERS).cache
    config = replace(CONFIG, dense_below=96)
    assert [attention_path(cache, i, config) for i in range(LAYERS)] == ["dense"] * LAYERS
    assert attention_path(cache, 0, replace(config, dense_below=95)) == "sparse"
    cache.start_report()
    reasons = [x.plan.reason for x in attention_report(cache, config)]
    assert reasons[0] == "the cache's 96 tokens are within dense_below, 96"
    assert reasons[2] == "a budget of 0"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "after_eager_steps"])
def test_compiled_steps(device: str, backend: str, inside: bool, warm: bool) -> None:
    torch._dynamo.reset()
    eager, compiled = (Model(device, layers=LAYERS) for _ in range(2))
    counter = CompileCounterWithBackend(backend)

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if inside:
            compiled.cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], compiled.cache, i, CONFIG) for i in range(LAYERS)])

    step = torch.compile(layers, fullgraph=True, backend=counter)
    for model in (eager, compiled):
        model.attend(40, CONFIG, [40, 24])
        for _ in range(2 * warm):
            model.attend(1, CONFIG)
    compiled.cache.reserve(40)
    for _ in range(12):
        expected = eager.attend(1, CONFIG)
        inputs = compiled.inputs(1)
        if not inside:
            compiled.cache.advance(1)
        assert_same_bits(step(*inputs), expected)
    assert counter.frame_count == 1
    compiled.cache.sync_lengths()
    for _ in range(12):  # the second row crosses the limit in eager mode, after compiled steps
        assert_same_bits(compiled.attend(1, CONFIG), eager.attend(1, CONFIG))
    compiled.check()


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "after_eager_steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_a_cuda_graph(inside: bool, warm: bool, dtype: torch.dtype) -> None:
    """Two captures without a step between them, of which the second is replayed."""
    eager, captured = (Model("cuda", layers=LAYERS, dtype=dtype) for _ in range(2))
    for model in (eager, captured):
        model.attend(40, CONFIG, [40, 24])
        for _ in range(2 * warm):
            model.attend(1, CONFIG)
    captured.cache.reserve(40)
    q, k, v = (torch.zeros(LAYERS, 2, 1, heads, D, dtype=dtype, device="cuda") for heads in (4, HKV, HKV))

    def step() -> Tensor:
        if inside:
            captured.cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], captured.cache, i, CONFIG) for i in range(LAYERS)])

    if not inside:
        captured.cache.advance(1)  # captured code runs only in a replay
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            out = step()
    for i in range(12):
        expected = eager.attend(1, CONFIG)
        for static, new in zip((q, k, v), captured.inputs(1), strict=True):
            static.copy_(new)
        if not inside and i:
            captured.cache.advance(1)
        graph.replay()
        assert_same_bits(out, expected)
    captured.cache.sync_lengths()
    for _ in range(12):
        assert_same_bits(captured.attend(1, CONFIG), eager.attend(1, CONFIG))
    captured.check()


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match="dense_below must be at least 0, got -1"):
        QuestConfig(dense_below=-1)


def test_the_longest_list_holds_a_short_sequence() -> None:
    config = QuestConfig(64, 16, dense_below=100)
    assert (config.num_pages, config.most_pages, config.selection[0]) == (4, 7, 4)
