"""quest_attention over a cache: against dense attention in float64, against the reference's Quest, and compiled."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from history import History, numbers, poison, same_snapshot, snapshot
from quest_ops import (
    PagedKVCache,
    QuestConfig,
    append_kv,
    attention,
    attention_path,
    estimate,
    quest_attention,
    reference,
    select_pages,
    sparse_decode,
    topk_pages,
    update_bounds,
)
from quest_ops.page_bounds import new_bounds
from support import DTYPES, assert_accurate, assert_same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

S, HKV, D = 8, 2, 64
BOUNDS = pytest.mark.parametrize("bounds", ["cache", "int8"])


class Model(History):
    """A history whose steps attend; ``exact`` and ``plain`` say what the last step should have given."""

    def __init__(self, device: str, heads: int = 4, layers: int = 2, batch: int = 2, seed: int = 0, **cache: Any):
        options = {"max_tokens": 96, "page_size": S, "dtype": torch.float32} | cache
        super().__init__(PagedKVCache(layers, HKV, D, batch_size=batch, device=device, **options), seed)
        for pool in self.cache.pools:
            poison(pool)
        self.heads, self.lens = heads, [0] * batch

    def inputs(self, T: int, new_lens: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of all layers, [L, B, T, heads, D], on the device; recorded."""
        k, v = self.new_tokens(T, new_lens)
        q = self.randn(*k.shape[:3], self.heads, D)
        self.q, self.lens = q, [T] * len(self.k) if new_lens is None else new_lens
        self.record(k, v, new_lens)
        return tuple(x.to(self.cache.device) for x in (q, k, v))

    def attend(
        self, T: int, config: QuestConfig, new_lens: list[int] | None = None, scale: float | None = None
    ) -> Tensor:
        q, k, v = self.inputs(T, new_lens)
        self.cache.advance(T, new_lens)
        layers = range(self.cache.num_layers)
        return torch.stack([quest_attention(q[i], k[i], v[i], self.cache, i, config, scale) for i in layers])

    def expected(self, config: QuestConfig, layer: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """The last step's output of a layer [B, T, Hq, D] from the history alone; padding gives 0.

        Once in float64, and in the cache's dtype as plain PyTorch has it, in several orders of summation.
        """
        path = attention_path(self.cache, layer, config, self.q.shape[2])
        scale = D**-0.5 if scale is None else scale
        exact = torch.zeros_like(self.q[layer], dtype=torch.float64)
        plain = torch.zeros((naive.RUNS, *exact.shape), dtype=self.q.dtype)
        for b, n in enumerate(self.lens):
            if n == 0:
                continue
            q, k, v = self.q[layer, b, :n], self.k[b][layer], self.v[b][layer]
            if path == "sparse":
                exact[b, :n], plain[:, b, :n] = quest(q, k, v, config, scale)
                continue
            exact[b, :n] = dense(*(x.double() for x in (q, k, v)), scale)
            attend = dense if path == "dense" else torch_attention
            device = "cpu" if path == "dense" else self.cache.device
            (runs,) = naive.in_several_orders(lambda *x: (attend(*x),), *(x.to(device) for x in (q, k, v)), scale)  # noqa: B023
            plain[:, b, :n] = runs.cpu()
        return exact, plain

    def assert_right(self, out: Tensor, config: QuestConfig, scale: float | None = None) -> None:
        for layer in range(self.cache.num_layers):
            assert_accurate(out[layer], *self.expected(config, layer, scale), self.cache.k_cache.dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of q [n, Hq, D], the last n tokens of k, v [tokens, Hkv, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~causal(q.shape[1], k.shape[1]), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by PyTorch's own kernels, which are what a prefill is left to."""
    mask = causal(len(q), len(k)).to(q.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def causal(new: int, tokens: int) -> Tensor:
    return torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)


def quest(q: Tensor, k: Tensor, v: Tensor, config: QuestConfig, scale: float) -> tuple[Tensor, Tensor]:
    """The reference's selection, then attention by the reference and by plain PyTorch in several orders."""
    pages = -(-len(k) // S)
    table, length = torch.arange(pages, dtype=torch.int32)[None], torch.tensor([len(k)], dtype=torch.int32)
    padded = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * S - len(x))) for x in (k, v))
    k, v = (x.unflatten(0, (pages, S)).transpose(1, 2) for x in padded)
    if config.bounds == "cache":
        bounds = reference.update_bounds(k, k.new_zeros(pages, HKV, 2, D), table, length)
    else:
        rounded, scales = new_bounds((pages, HKV), D, "int8", k.dtype, "cpu")
        update_bounds(k, rounded, table, length, k_scales=scales)
        bounds = numbers(rounded, scales)
    scores = reference.estimate(q[None], bounds, table, length, S)
    how = (config.group_reduce, config.sink_pages, config.recent_pages, scale)
    chosen = reference.topk_pages(scores, length, S, config.num_pages, HKV, *how)
    arguments = (q[None], k, v, table, length, chosen, scale)
    return reference.sparse_decode(*arguments)[0][0], naive.in_several_orders(naive.sparse_decode, *arguments)[0][:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 8])
def test_a_budget_that_holds_everything_is_dense_attention(device: str, heads: int, dtype: torch.dtype) -> None:
    model = Model(device, heads, dtype=dtype)
    config = QuestConfig(budget=1024, page_size=S, dense_layers=0)
    for T in (13, 1, 2, 1, 8, 7, 17, 1):  # prefill, decode over page boundaries, prefill behind it
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
    config = QuestConfig(16, S, dense_layers=0, group_reduce="soft")
    for T in (50, 12, 1, 4):
        model.assert_right(model.attend(T, config, scale=0.5), config, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@BOUNDS
def test_ragged_steps(device: str, dtype: torch.dtype, bounds: str) -> None:
    """Padding is NaN in k and v, and 0 in the output; rows of all lengths, also none, select for themselves."""
    model = Model(device, batch=3, dtype=dtype, bounds=bounds)
    config = QuestConfig(16, S, dense_layers=1, bounds=bounds)
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
    """The output and what is left in the cache."""
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
            append_kv(k[layer], v[layer], k_cache, v_cache, k_bounds, table, other.cache.start_lens, None, k_scales)
            scores = estimate(q[layer], k_bounds, table, lens, S, k_scales)
            pages = topk_pages(scores, lens, S, 3, HKV, config.group_reduce, 1, 1, D**-0.5)
            assert_same_bits(out[layer], sparse_decode(q[layer], k_cache, v_cache, table, lens, pages)[0])
    model.check()
    assert same_snapshot(snapshot(model.cache), snapshot(other.cache))


def test_a_window_reads_no_bounds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = Model(device), QuestConfig(24, S, 1, 2, 0)
    model.attend(60, config)
    for name in ("estimate", "decode_step"):
        monkeypatch.setattr(attention, name, None)
    model.assert_right(model.attend(1, config), config)


def test_a_cache_no_larger_than_the_budget_selects_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(device, max_tokens=24)
    config = QuestConfig(24, S, dense_layers=0)
    assert attention_path(model.cache, 1, config) == "dense"
    monkeypatch.setattr(attention, "select_pages", None)
    monkeypatch.setattr(attention, "decode_step", None)
    model.attend(12, config)
    model.assert_right(model.attend(5, config), config)


def test_the_paths_have_names(device: str) -> None:
    cache, config = Model(device).cache, QuestConfig(16, S, dense_layers=1)
    assert attention_path(cache, 0, config, 9) == attention_path(cache, 1, config, 9) == "prefill"
    assert [attention_path(cache, layer, config, 8) for layer in (0, 1)] == ["dense", "sparse"]


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
    monkeypatch.setattr(attention, "_MASKED_QUERIES", 16)
    model, config = Model(device), QuestConfig(1024, S, dense_layers=0)
    for T, lens in ((9, [9, 0]), (50, [50, 33]), (33, [20, 33])):
        model.assert_right(model.attend(T, config, lens), config)


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    config = QuestConfig(16, S, dense_layers=1)
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
    model, config = Model(device, batch=3), QuestConfig(16, S, dense_layers=1)
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
    config = QuestConfig(16, S, dense_layers=1)
    four, three = Model(device), Model(device)
    for model in (four, three):
        model.attend(41, config)
    out = four.attend(1, config)
    q, k, v = three.inputs(1)
    three.cache.advance(1)
    for layer in range(2):
        short = quest_attention(q[layer, :, 0], k[layer, :, 0], v[layer, :, 0], three.cache, layer, config)
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
    model, config = Model(device), QuestConfig(16, S)
    model.attend(10, config)
    q, k, v = (x[0] for x in model.inputs(3))
    model.cache.advance(3)
    before = snapshot(model.cache)
    with pytest.raises(ValueError, match=message):
        quest_attention(*change(q, k, v), model.cache, 0, config)
    with pytest.raises(ValueError, match=r"config.page_size must be the cache's, 8, got 16"):
        quest_attention(q, k, v, model.cache, 0, QuestConfig(16, 16))
    with pytest.raises(ValueError, match="config.bounds must be the cache's, int8, got cache"):
        quest_attention(q, k, v, model.cache, 0, QuestConfig(16, S, bounds="cache"))
    with pytest.raises(ValueError, match="layer must be 0 to 1, got 2"):
        quest_attention(q, k, v, model.cache, 2, config)
    assert same_snapshot(before, snapshot(model.cache))
    quest_attention(q, k, v, model.cache, 0, config)
    with pytest.raises(RuntimeError, match="layer 0 has no open step"):
        quest_attention(q, k, v, model.cache, 0, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"page_size": 20}, "page_size must be one of 8, 16, 32, 64, 128, got 20"),
        ({"budget": 15}, "budget must be at least a page, 16 tokens, got 15"),
        ({"sink_pages": -1}, "sink_pages must be at least 0, got -1"),
        ({"recent_pages": -1}, "recent_pages must be at least 0, got -1"),
        ({"dense_layers": -1}, "dense_layers must be at least 0, got -1"),
        ({"budget": 47, "sink_pages": 2}, r"at most the 2 pages of the budget, got 2 \+ 1"),
        ({"group_reduce": "mean"}, "group_reduce must be one of none, max, sum, soft, got 'mean'"),
        ({"bounds": "int4"}, "bounds must be one of cache, int8, got 'int4'"),
    ],
)
def test_bad_configs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestConfig(**arguments)


def test_a_budget_is_whole_pages() -> None:
    assert [QuestConfig(budget, 16).num_pages for budget in (16, 31, 32, 2048)] == [1, 1, 2, 128]
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuestConfig().budget = 1  # type: ignore[misc]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@BOUNDS
def test_compiled_steps(device: str, backend: str, inside: bool, bounds: str) -> None:
    """One graph for any number of steps and whatever the lengths, with the eager result bit for bit."""
    torch._dynamo.reset()
    config = QuestConfig(24, S, dense_layers=1, bounds=bounds)
    eager, compiled = (Model(device, bounds=bounds) for _ in range(2))
    counter = CompileCounterWithBackend(backend)

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if inside:
            compiled.cache.advance(1)
        outs = [quest_attention(q[i], k[i], v[i], compiled.cache, i, config) for i in range(compiled.cache.num_layers)]
        return torch.stack(outs)

    step = torch.compile(layers, fullgraph=True, backend=counter)
    for model in (eager, compiled):
        model.attend(29, config, [29, 3])
        model.attend(1, config)
    compiled.cache.reserve(40)
    for _ in range(20):
        expected = eager.attend(1, config)
        q, k, v = compiled.inputs(1)
        if not inside:
            compiled.cache.advance(1)
        assert_same_bits(step(q, k, v), expected)
    assert counter.frame_count == 1
    if inside:
        assert compiled.cache.sync_lengths() == [50, 24]
    compiled.check()


@BOUNDS
def test_a_compiled_step_copies_no_cache(device: str, bounds: str) -> None:
    torch._dynamo.reset()
    model, config = Model(device, layers=3, bounds=bounds), QuestConfig(24, S, dense_layers=1, bounds=bounds)
    model.attend(29, config)

    @torch.compile(fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([quest_attention(q[i], k[i], v[i], model.cache, i, config) for i in range(3)])

    model.cache.advance(1)
    out, (code, *_) = run_and_get_code(step, *model.inputs(1))
    model.assert_right(out, config)
    assert [code.count(f"{name}.default(") for name in ("append_kv", "decode_step")] == [1, 2]
    pools = "|".join(re.escape(str(tuple(t.shape))) for t in model.cache.pools)
    assert re.search(rf"assert_size_stride\(\w+, ({pools})", code)
    assert not re.search(rf"empty_strided\w*\(({pools})", code)


def test_compiled_prefill_and_ragged_steps(device: str) -> None:
    """Steps of several tokens compile whole as well, also where the compiled code sees no host lengths."""
    torch._dynamo.reset()
    model, config = Model(device, batch=3), QuestConfig(24, S, dense_layers=1)
    lens = torch.zeros(3, dtype=torch.int32, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q: Tensor, k: Tensor, v: Tensor, new_lens: Tensor) -> Tensor:
        model.cache.advance(q.shape[2], new_lens)
        return torch.stack([quest_attention(q[i], k[i], v[i], model.cache, i, config) for i in range(2)])

    model.cache.reserve(96)
    for T, real in ((20, [20, 7, 0]), (16, [0, 16, 9]), (4, [4, 0, 3]), (1, [1, 1, 0])):
        q, k, v = model.inputs(T, real)
        lens.copy_(torch.tensor(real))
        model.assert_right(step(q, k, v, lens), config)
    model.cache.sync_lengths()
    model.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("inside", [False, True], ids=["advance_before", "advance_inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOUNDS
def test_steps_in_a_cuda_graph(inside: bool, dtype: torch.dtype, bounds: str) -> None:
    """In bfloat16 a step may be one launch."""
    config, device = QuestConfig(24, S, dense_layers=1, bounds=bounds), "cuda"
    eager, captured = (Model(device, dtype=dtype, bounds=bounds) for _ in range(2))
    for model in (eager, captured):
        model.attend(29, config, [29, 3])
        model.attend(1, config)
    captured.cache.reserve(40)
    q, k, v = (torch.zeros(2, 2, 1, heads, D, dtype=dtype, device=device) for heads in (4, HKV, HKV))

    def step() -> Tensor:
        if inside:
            captured.cache.advance(1)
        return torch.stack([quest_attention(q[i], k[i], v[i], captured.cache, i, config) for i in range(2)])

    graph = torch.cuda.CUDAGraph()
    if not inside:
        captured.cache.advance(1)  # what is captured runs only when it is replayed
    with torch.cuda.graph(graph):
        out = step()
    for i in range(20):
        expected = eager.attend(1, config)
        for static, new in zip((q, k, v), captured.inputs(1), strict=True):
            static.copy_(new)
        if not inside and i:
            captured.cache.advance(1)
        graph.replay()
        assert_same_bits(out, expected)
    assert captured.cache.sync_lengths() == [50, 24]
    captured.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOUNDS
def test_decode_never_waits_for_the_gpu(dtype: torch.dtype, bounds: str) -> None:
    model = Model("cuda", batch=2, dtype=dtype, bounds=bounds)
    config = QuestConfig(24, S, dense_layers=1, bounds=bounds)
    model.attend(40, config)
    steps = [model.inputs(1) for _ in range(20)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for q, k, v in steps:
            model.cache.advance(1)
            for layer in range(2):
                out = quest_attention(q[layer], k[layer], v[layer], model.cache, layer, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_accurate(out, *model.expected(config, 1), dtype)
    model.check()
