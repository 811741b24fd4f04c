"""quest_attention over a cache: against dense attention in float64, and against the reference's Quest."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers.attention_model import BOUNDS, HKV, D, Model, S
from helpers.cache_model import same_snapshot, snapshot
from helpers.operator_cases import DTYPES, assert_accurate, assert_same_bits
from quest_ops import (
    PagedKVCache,
    QuestConfig,
    append_kv,
    attention,
    attention_path,
    decode_step,
    dense,
    estimate,
    kv_state,
    quest_attention,
    select_pages,
    sparse_decode,
    topk_pages,
)
from torch import Tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 8])
def test_a_budget_that_holds_everything_is_dense_attention(device: str, heads: int, dtype: torch.dtype) -> None:
    model = Model(device, heads, dtype=dtype)
    config = QuestConfig(budget=1024, page_size=S, dense_layers=0)
    for T in (13, 1, 2, 1, 8, 7, 17, 1):  # prefill, decode over page boundaries, later prefill
        model.assert_right(model.attend(T, config), config)
        model.check()


@pytest.mark.parametrize("group_reduce", ["max", "sum", "soft", "none"])
@pytest.mark.parametrize("forced", [(0, 1), (1, 1), (1, 2), (0, 0)])
@BOUNDS
def test_below_the_budget_it_is_the_references_quest(
    device: str, group_reduce: str, forced: tuple[int, int], bounds: str
) -> None:
    model = Model(device, heads=6, bounds=bounds)
    config = QuestConfig(24, S, *forced, 1, group_reduce, bounds)  # type: ignore[arg-type]
    assert [attention_path(model.cache, layer, config) for layer in range(2)] == ["dense", "sparse"]
    for T in (70, 1, 3, 8, 1):
        model.assert_right(model.attend(T, config), config)


def test_scale_reaches_attention_and_soft_selection(device: str) -> None:
    model = Model(device)
    config = QuestConfig(16, S, sink_pages=0, dense_layers=0, group_reduce="soft")
    for T in (50, 12, 1, 4):
        model.assert_right(model.attend(T, config, scale=0.5), config, scale=0.5)


def test_the_default_scale_of_a_selection(device: str) -> None:
    """Only "soft" depends on it."""
    model, config = Model(device), QuestConfig(16, S, sink_pages=0, dense_layers=0, group_reduce="soft")
    model.attend(60, config)
    k_bounds, k_scales = model.cache.layer(0)[2:]
    q = 4 * torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0)).to(device)
    tensors = (q, k_bounds, model.cache.page_table, model.cache.seq_lens, config)
    default, given, other = (select_pages(*tensors, scale, k_scales) for scale in (None, D**-0.5, 100.0))
    assert torch.equal(default, given)
    assert not torch.equal(default, other)


def test_a_feature_that_the_operators_lack_runs_dense() -> None:
    config = QuestConfig(16, S, sink_pages=0, dense_layers=0)
    assert attention.decide(config, 0, 100, 1, lacks_feature=True) == ("dense", "feature")
    assert attention.decide(config, 0, 100, 1) == ("sparse", "over the budget")


def test_the_plan_of_a_layer_is_its_path(device: str) -> None:
    model, config = Model(device), QuestConfig(16, S, sink_pages=0, dense_layers=1)
    plans = [attention.layer_plan(model.cache, layer, config) for layer in range(2)]
    assert [plan.path for plan in plans] == ["dense", "sparse"]


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("T", [1, 3])
def test_a_decode_step_refuses_backward_through_each_input(device: str, name: str, T: int) -> None:
    model, config = Model(device), QuestConfig(16, S, sink_pages=0, dense_layers=0)
    model.attend(40, config)
    given = dict(zip("qkv", (x[0] for x in model.inputs(T)), strict=True))
    given[name].requires_grad_()
    model.cache.advance(T)
    out = quest_attention(**given, cache=model.cache, layer=0, config=config)
    with pytest.raises(RuntimeError, match="quest_attention over a cache"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@BOUNDS
def test_ragged_steps(device: str, dtype: torch.dtype, bounds: str) -> None:
    """Padding is NaN in k and v, and gives 0. Rows of any length, 0 included, select their own pages."""
    model = Model(device, batch=3, dtype=dtype, bounds=bounds)
    config = QuestConfig(16, S, sink_pages=0, dense_layers=1, bounds=bounds)
    steps = ((40, [40, 0, 23]), (9, [0, 9, 4]), (1, [1, 0, 1]), (6, [6, 5, 0]), (8, [3, 8, 1]), (1, [1, 1, 1]))
    for T, lens in steps:
        out = model.attend(T, config, lens)
        model.assert_right(out, config)
        model.check()


@BOUNDS
def test_a_sequence_within_the_budget_equals_dense_bit_for_bit(device: str, bounds: str) -> None:
    sparse, dense = (Model(device, batch=2, bounds=bounds) for _ in range(2))
    configs = [QuestConfig(48, S, dense_layers=layers, bounds=bounds) for layers in (0, 2)]
    for T, lens in ((40, [40, 3]), *[(1, [1, 1])] * 8):
        first, second = (m.attend(T, c, lens) for m, c in zip((sparse, dense), configs, strict=True))
        assert_same_bits(first, second)
    first, second = sparse.attend(1, configs[0]), dense.attend(1, configs[1])
    assert not torch.equal(first[:, 0], second[:, 0])  # 49 tokens: the first row now drops a page
    assert_same_bits(first[:, 1], second[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_reduce", ["max", "sum", "soft", "none"])
@BOUNDS
def test_a_step_is_the_four_operators_bit_for_bit(
    device: str, group_reduce: str, dtype: torch.dtype, bounds: str
) -> None:
    """The output and the cache after the step."""
    model, other = (Model(device, heads=8, batch=3, dtype=dtype, bounds=bounds) for _ in range(2))
    config = QuestConfig(24, S, 1, 1, 0, group_reduce, bounds)  # type: ignore[arg-type]
    for m in (model, other):
        m.attend(60, config, [60, 3, 22])
    for T in (1, 1, 4, 8, 1):
        out = model.attend(T, config)
        q, k, v = other.inputs(T)
        other.cache.advance(T)
        table, lens = other.cache.page_table, other.cache.seq_lens
        for layer, (k_cache, v_cache, k_bounds, k_scales) in enumerate(map(other.cache.layer, range(2))):
            caches = (k_cache, v_cache, k_bounds, table)
            append_kv(k[layer], v[layer], *caches, other.cache.start_lens, None, k_scales, config.std_factor)
            scores = estimate(q[layer], k_bounds, table, lens, S, k_scales)
            pages = topk_pages(scores, lens, S, 3, HKV, config.group_reduce, 1, 1, D**-0.5)
            assert_same_bits(out[layer], sparse_decode(q[layer], k_cache, v_cache, table, lens, pages)[0])
    model.check()
    assert same_snapshot(snapshot(model.cache), snapshot(other.cache))


def test_a_window_reads_no_bounds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models, config = [Model(device, dtype=dtype) for dtype in DTYPES], QuestConfig(24, S, 1, 2, 0)
    for model in models:
        model.attend(60, config)
    monkeypatch.setattr(attention, "estimate", None)
    monkeypatch.setattr(kv_state, "decode_step", None)
    for model in models:
        model.assert_right(model.attend(1, config), config)


def test_a_cache_no_larger_than_the_budget_selects_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(device, max_tokens=24)
    config = QuestConfig(24, S, dense_layers=0)
    assert attention_path(model.cache, 1, config) == "dense"
    monkeypatch.setattr(attention, "select_pages", None)
    steps = Mock(wraps=kv_state.decode_step)
    monkeypatch.setattr(kv_state, "decode_step", steps)
    model.attend(12, config)
    model.assert_right(model.attend(5, config), config)
    num_pages = list(inspect.signature(decode_step).parameters).index("num_pages")
    assert [call.args[num_pages] for call in steps.call_args_list] == [0, 0]  # of two layers


def test_the_paths_have_names(device: str) -> None:
    cache, config = Model(device).cache, QuestConfig(16, S, sink_pages=0, dense_layers=1)
    assert attention_path(cache, 0, config, 9) == attention_path(cache, 1, config, 9) == "prefill"
    assert [attention_path(cache, layer, config, 8) for layer in (0, 1)] == ["dense", "sparse"]
    rules = [
        attention.decide(config, layer, cache.pages_per_sequence, num_new).rule for layer, num_new in ((0, 9), (1, 8))
    ]
    assert rules == ["many new tokens", "over the budget"]


def test_one_query_head(device: str) -> None:
    cache = PagedKVCache(1, 1, D, max_tokens=32, page_size=S, dtype=torch.float32, device=device)
    config = QuestConfig(16, S, dense_layers=0)
    q, k, v = (torch.randn(1, 20, 1, D, device=device) for _ in range(3))
    cache.advance(20)
    quest_attention(q, k, v, cache, 0, config)
    cache.advance(1)
    assert quest_attention(q[:, :1], k[:, :1], v[:, :1], cache, 0, config).shape == (1, 1, 1, D)
    with pytest.raises(ValueError, match=r"q must have shape \[1, 1, a multiple of 1, 64\] to go with the cache, got"):
        quest_attention(q[:, :1, :0], k[:, :1], v[:, :1], cache, 0, config)


@pytest.mark.parametrize("chunks", [[40, 40], [9, 30, 1, 20, 3, 17], [79, 1]])
def test_prefill_in_chunks_equals_one_prefill(device: str, chunks: list[int]) -> None:
    whole, config = Model(device), QuestConfig(1024, S, dense_layers=0)
    out = whole.attend(80, config)
    parts = Model(device)
    k, v = (torch.stack([x[b] for b in range(2)], 1) for x in (whole.k, whole.v))
    done, outs = 0, []
    for T in chunks:
        parts.cache.advance(T)
        piece = slice(done, done + T)
        q, new_k, new_v = (x[:, :, piece].to(device) for x in (whole.q, k, v))
        outs.append(torch.stack([quest_attention(q[i], new_k[i], new_v[i], parts.cache, i, config) for i in range(2)]))
        done += T
    for layer in range(2):
        exact, plain = whole.expected(config, layer)
        assert_accurate(out[layer], exact, plain, torch.float32)
        assert_accurate(torch.cat(outs, 2)[layer], exact, plain, torch.float32)
    parts.k, parts.v = whole.k, whole.v
    parts.check()


def test_a_long_prefill_behind_others_is_cut_to_bound_its_mask(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_BLOCK", 16)
    model, config = Model(device), QuestConfig(1024, S, dense_layers=0)
    for T, lens in ((9, [9, 0]), (50, [50, 33]), (33, [20, 33])):
        model.assert_right(model.attend(T, config, lens), config)


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    config = QuestConfig(16, S, sink_pages=0, dense_layers=1)
    batch, alone = Model(device, batch=3, max_tokens=96), Model(device, batch=1, max_tokens=88)
    for T, lens in ((30, [30, 9, 1]), (1, [1, 1, 1]), (4, [4, 4, 4])):
        q, k, v = batch.inputs(T, lens)
        batch.cache.advance(T, lens)
        alone.cache.advance(T)
        for layer in range(2):
            many = quest_attention(q[layer], k[layer], v[layer], batch.cache, layer, config)
            one = quest_attention(q[layer, :1], k[layer, :1], v[layer, :1], alone.cache, layer, config)
            if T <= 8:
                assert_same_bits(many[:1], one)


def test_forks_go_their_own_ways(device: str) -> None:
    model, config = Model(device, batch=3), QuestConfig(16, S, sink_pages=0, dense_layers=1)
    model.attend(45, config, [45, 0, 0])
    model.fork(0, 1)
    model.fork(0, 2)
    for T in (1, 1, 5):
        model.assert_right(model.attend(T, config), config)
    model.crop(43, 1)
    model.fork(1, 0)
    model.assert_right(model.attend(2, config), config)
    model.check()


def test_q_of_one_token_may_leave_out_its_dimension(device: str) -> None:
    config = QuestConfig(16, S, sink_pages=0, dense_layers=1)
    four, three = Model(device), Model(device)
    for model in (four, three):
        model.attend(41, config)
    for scale in (None, 0.5):
        out = four.attend(1, config, scale=scale)
        q, k, v = three.inputs(1)
        three.cache.advance(1)
        for layer in range(2):
            short = quest_attention(q[layer, :, 0], k[layer, :, 0], v[layer, :, 0], three.cache, layer, config, scale)
            assert_same_bits(short, out[layer, :, 0])


@BOUNDS
def test_select_pages_is_what_attention_reads(device: str, bounds: str) -> None:
    model, config = Model(device, bounds=bounds), QuestConfig(24, S, sink_pages=1, dense_layers=0, bounds=bounds)
    model.attend(60, config)
    out, cache = model.attend(1, config), model.cache
    q, (k_cache, v_cache, k_bounds, k_scales) = model.q[1].to(device), cache.layer(1)
    pages = select_pages(q, k_bounds, cache.page_table, cache.seq_lens, config, k_scales=k_scales)
    assert pages.shape == (2, 1, HKV, 3)
    assert (pages[..., 0] == 0).all()
    assert (pages[..., 2] == 7).all()
    assert_same_bits(sparse_decode(q, k_cache, v_cache, cache.page_table, cache.seq_lens, pages)[0], out[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0, 0, 0], k, v), r"q must have shape \[B, Hq, D\] or \[B, T, Hq, D\], got \[64\]"),
        (lambda q, k, v: (q[:1], k, v), r"q must have shape \[2, 3, a multiple of 2, 64\].*, got \[1, 3, 4, 64\]"),
        (
            lambda q, k, v: (q[:, :, :3], k, v),
            r"q must have shape .*, a multiple of 2, .*, got \[2, 3, 3, 64\]",
        ),
        (lambda q, k, v: (q[..., :32], k, v), r"q must have shape .*, got \[2, 3, 4, 32\]"),
        (lambda q, k, v: (q[:, 0], k, v), r"k must have shape \[2, 2, 64\] to go with q, got \[2, 3, 2, 64\]"),
        (lambda q, k, v: (q, k, v[:, :2]), r"v must have shape \[2, 3, 2, 64\] to go with q, got \[2, 2, 2, 64\]"),
        (lambda q, k, v: (q, k.half(), v), r"k must be torch.float32 on .* like the cache, got torch.float16"),
        (
            lambda q, k, v: (q.to("meta"), k, v),
            r"q must be .* like the cache, got torch.float32 on meta",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    device: str, change: Callable[..., tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    model, config = Model(device), QuestConfig(16, S, sink_pages=0)
    model.attend(10, config)
    q, k, v = (x[0] for x in model.inputs(3))
    model.cache.advance(3)
    before = snapshot(model.cache)
    with pytest.raises(ValueError, match=message):
        quest_attention(*change(q, k, v), model.cache, 0, config)
    with pytest.raises(ValueError, match=r"config.page_size must be the cache's, 8, got 16"):
        quest_attention(q, k, v, model.cache, 0, QuestConfig(32, 16))
    with pytest.raises(ValueError, match="config.bounds must be the cache's, int4, got cache"):
        quest_attention(q, k, v, model.cache, 0, QuestConfig(16, S, bounds="cache"))
    with pytest.raises(ValueError, match=r"config.std_factor must be the cache's, 1.0, got None"):
        quest_attention(q, k, v, model.cache, 0, QuestConfig(16, S, std_factor=None))
    with pytest.raises(ValueError, match="layer must be 0 to 1, got 2"):
        quest_attention(q, k, v, model.cache, 2, config)
    assert same_snapshot(before, snapshot(model.cache))
    quest_attention(q, k, v, model.cache, 0, config)
    with pytest.raises(RuntimeError, match="layer 0 has no open step"):
        quest_attention(q, k, v, model.cache, 0, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"page_size": 20}, "page_size must be one of 4, 8, 16, 32, 64, 128, got 20"),
        ({"budget": 15}, "budget must be at least a page, 16 tokens, got 15"),
        ({"sink_pages": -1}, "sink_pages must be at least 0, got -1"),
        ({"recent_pages": -1}, "recent_pages must be at least 0, got -1"),
        ({"dense_layers": -1}, "dense_layers must be at least 0, got -1"),
        ({"budget": 47, "sink_pages": 2}, r"at most the 2 pages of the budget, got 2 \+ 1"),
        ({"group_reduce": "mean"}, "group_reduce must be one of none, max, sum, soft, got 'mean'"),
        ({"bounds": "int2"}, "bounds must be one of cache, int8, int4, got 'int2'"),
        ({"std_factor": -1.0}, "std_factor must be a finite number of at least 0, or None, got -1.0"),
        ({"std_factor": math.nan}, "std_factor must be a finite number of at least 0, or None, got nan"),
        ({"budget": 16}, r"at most the 1 pages of the budget, got 1 \+ 1"),
    ],
)
def test_bad_configs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestConfig(**arguments)


def test_a_budget_is_whole_pages() -> None:
    assert [QuestConfig(budget, 16, sink_pages=0).num_pages for budget in (16, 31, 32, 2048)] == [1, 1, 2, 128]
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuestConfig().budget = 1  # type: ignore[misc]
