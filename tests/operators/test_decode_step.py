"""decode_step: the bits of append_kv, estimate, topk_pages and sparse_decode in a row, in results and caches.

A num_pages of 0 is append_kv and dense sparse_decode.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.operator_cases import (
    DTYPES,
    GARBAGE,
    HEAD_DIMS,
    KINDS,
    LAYOUTS,
    PAGE_SIZES,
    Case,
    Kind,
    Shape,
    assert_same_bits,
    shapes,
)
from helpers.steps import assert_same_step, before_step, caches, four_steps, limits_around, on, one_step
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops

HALF = (torch.float16, torch.bfloat16)
REDUCES = ("none", "max", "sum", "soft")
# Pages by scores, by scores in long sequences, and all of them. Dense below: of the tests' lengths, some lie beyond.
OPTIONS: list[dict[str, Any]] = [{"num_pages": 6}, {"num_pages": 6, "dense_below": 100}, {"num_pages": 0}]
MAIN_KINDS = ("minmax", "minmax-8-bit", "mean-std", "mean-std-4-bit")
ALL_BOUNDS = pytest.mark.parametrize("kind", [KINDS[name] for name in MAIN_KINDS], ids=MAIN_KINDS)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Shape, dict[str, Any]]:
    """Any step; a single GPU launch supports half of them."""
    shape = draw(shapes(max_shared_pages=0, any_kind=KINDS["minmax-8-bit"]))
    if draw(st.booleans()):
        aligned = st.integers(0, LAYOUTS.index("sliced"))
        shape = replace(
            shape,
            dtype=draw(st.sampled_from(HALF)),
            group=draw(st.integers(1, 16)),
            new_tokens=draw(st.integers(0, 4)),
            # 8 bytes between rows are too few for aligned loads.
            layouts=(*draw(st.tuples(*[aligned] * 3)), draw(st.integers(0, 1) if shape.kind.scaled else aligned)),
        )
    least = max(1, shape.new_tokens)
    shape = replace(shape, lengths=tuple(max(least, n) for n in shape.lengths))
    sink, recent = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return shape, {
        "num_pages": draw(st.integers(max(1, sink + recent), max(4, shape.capacity + 2))),
        "group_reduce": draw(st.sampled_from(REDUCES)),
        "sink_pages": sink,
        "recent_pages": recent,
        "scale": draw(st.sampled_from((None, 0.3))),
    }


@given(steps())
def test_a_step_is_the_four_operators(device: str, drawn: tuple[Shape, dict[str, Any]]) -> None:
    shape, options = drawn
    after = assert_same_step(before_step(shape), device, **options)
    for actual, expected in zip(caches(after), caches(Case(shape)), strict=True):
        used = Case(shape).page_table.flatten()
        used = used[(used >= 0) & (used < len(expected))].long()
        assert_same_bits(actual.cpu()[used], expected[used])


@given(steps(), st.data())
def test_sequences_on_both_sides_of_dense_below(
    device: str, drawn: tuple[Shape, dict[str, Any]], data: st.DataObject
) -> None:
    shape, options = drawn
    assert_same_step(before_step(shape), device, **options, dense_below=data.draw(limits_around(shape.lengths)))


@given(steps())
def test_every_page(device: str, drawn: tuple[Shape, dict[str, Any]]) -> None:
    """The numbers of the selection and dense_below have no effect."""
    shape, options = drawn
    dense_below = options["num_pages"] * shape.page_size
    assert_same_step(before_step(shape), device, **options | {"num_pages": 0}, dense_below=dense_below)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 5, 8, 9, 16, 17])
def test_every_page_for_all_heads(device: str, group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = (330, 33, 16, 1)
    for i, kind in enumerate(MAIN_KINDS):
        page_size = PAGE_SIZES[(i + group) % len(PAGE_SIZES)]
        case = before_step(Shape(dtype, head_dim, page_size, 2, group, lengths=lengths, kind=KINDS[kind], seed=19))
        assert_same_step(case, device, 0, group_reduce=REDUCES[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    "lengths", [(20_000,), (12_345, 0, 1, 700, 4096, 16), (3000,) * 4], ids=["one", "ragged", "even"]
)
def test_every_page_of_long_sequences(device: str, lengths: tuple[int, ...], kv_heads: int, dtype: torch.dtype) -> None:
    """Rows of many splits beside rows of one, where no score or page list exists. A length of 0 is idle."""
    kind = KINDS["minmax-8-bit"]
    shape = Shape(dtype, 128, 16, kv_heads, 8 // kv_heads, lengths=lengths, kind=kind, seed=20)
    case = before_step(shape, tuple(min(1, n) for n in lengths))
    assert_same_step(case, device, 0, recent_pages=0)
    assert_same_step(case, device, 40, dense_below=4096)


@ALL_BOUNDS
@pytest.mark.parametrize("group_reduce", REDUCES)
@pytest.mark.parametrize("heads", [(8, 8), (16, 4), (32, 8), (8, 1), (32, 2), (12, 1), (9, 1), (40, 2)], ids=str)
def test_heads(device: str, heads: tuple[int, int], group_reduce: str, kind: Kind) -> None:
    Hq, Hkv = heads
    shape = Shape(torch.bfloat16, 128, 16, Hkv, Hq // Hkv, lengths=(330, 33, 16, 1), kind=kind, seed=1)
    assert_same_step(before_step(shape), device, 6, group_reduce=group_reduce)


@ALL_BOUNDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_kind_of_page(device: str, dtype: torch.dtype, head_dim: int, page_size: int, kind: Kind) -> None:
    lengths = (5 * page_size, 3 * page_size + 1, 1, 6 * page_size - 1)
    shape = Shape(dtype, head_dim, page_size, 1, 4, lengths=lengths, kind=kind, seed=2)
    for num_pages in (2, 5):
        assert_same_step(before_step(shape), device, num_pages)


@ALL_BOUNDS
@pytest.mark.parametrize("new_tokens", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_tokens(device: str, dtype: torch.dtype, new_tokens: int, kind: Kind) -> None:
    lengths = (8, 9, 15, 16, 17, 24, 131)
    shape = Shape(dtype, 64, 16, 2, 4, new_tokens, lengths, kind=kind, seed=3)
    for group_reduce in REDUCES:
        assert_same_step(before_step(shape), device, 3, group_reduce=group_reduce)


@ALL_BOUNDS
@pytest.mark.parametrize("sink_pages", [0, 1, 2])
@pytest.mark.parametrize("recent_pages", [0, 1, 2])
def test_forced_pages(device: str, sink_pages: int, recent_pages: int, kind: Kind) -> None:
    """With K from 1 to more than the number of pages."""
    lengths = tuple(16 * pages + off for pages, off in itertools.product((2, 11, 12), (-1, 0, 1)))
    case = before_step(Shape(torch.float16, 64, 16, 2, 2, lengths=lengths, kind=kind, seed=4))
    for num_pages in (max(1, sink_pages + recent_pages), 4, 11, 12, 13, 40):
        assert_same_step(case, device, num_pages, sink_pages=sink_pages, recent_pages=recent_pages)


@ALL_BOUNDS
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_long_sequences(device: str, dtype: torch.dtype, kind: Kind) -> None:
    lengths = (20_000, 16 * 1024 + 1, 4096, 4095, 1025, 257, 256, 16, 1)
    case = before_step(Shape(dtype, 64, 16, 1, 4, lengths=lengths, kind=kind, seed=5))
    for num_pages in (1, 64, 129, 1250, 3000):
        assert_same_step(case, device, num_pages)


@ALL_BOUNDS
@pytest.mark.parametrize("batch", [3, 17, 40])
@pytest.mark.parametrize("layouts", [(0, 1, 1, 1), (2, 2, 2, 0), (3, 3, 3, 3), (0, 0, 3, 0)])
def test_batches_and_layouts(device: str, batch: int, layouts: tuple[int, int, int, int], kind: Kind) -> None:
    lengths = tuple(1 + 37 * b**2 % 400 for b in range(batch))
    shape = Shape(torch.bfloat16, 128, 16, 2, 4, lengths=lengths, layouts=layouts, kind=kind, seed=6)
    assert_same_step(before_step(shape), device, 8, group_reduce="sum")


@pytest.mark.parametrize("options", [{"num_pages": 4}, {"num_pages": 0}, {"num_pages": 4, "dense_below": 50}], ids=str)
@pytest.mark.parametrize("batch", [256, 257])
def test_as_many_sequences_as_one_launch_takes_and_one_more(device: str, batch: int, options: dict[str, Any]) -> None:
    lengths = tuple(1 + 7 * b % 90 for b in range(batch))
    shape = Shape(torch.float16, 64, 8, 2, 1, lengths=lengths, kind=KINDS["minmax-8-bit"], seed=15)
    assert_same_step(before_step(shape), device, **options)


@ALL_BOUNDS
@pytest.mark.parametrize("num_pages", [0, 8, 400])
def test_a_capacity_of_20_000_pages(device: str, num_pages: int, kind: Kind) -> None:
    case = before_step(Shape(torch.bfloat16, 128, 16, 1, 8, lengths=(5000, 1), kind=kind, seed=7))
    more = 20_000 - case.page_table.shape[1]
    case = case.having(page_table=torch.nn.functional.pad(case.page_table, (0, more), value=GARBAGE))
    assert_same_step(case, device, num_pages)


@ALL_BOUNDS
@pytest.mark.parametrize("num_pages", [0, 7])
def test_shared_pages(device: str, num_pages: int, kind: Kind) -> None:
    shape = Shape(torch.float16, 64, 16, 2, 4, lengths=(400, 321, 190), shared_pages=9, kind=kind, seed=8)
    assert_same_step(before_step(shape), device, num_pages)


@ALL_BOUNDS
def test_equal_keys_tie_to_the_first_pages(device: str, kind: Kind) -> None:
    case = before_step(Shape(torch.float16, 64, 16, 1, 4, lengths=(16 * 30,), kind=kind))
    for x in (case.k_cache, case.k):
        x.fill_(0.5)
    x = on(case, device)
    where = (x.k_cache, x.k_bounds, x.page_table, x.start_lens)
    ops.update_bounds(*where, k_scales=x.k_scales, std_factor=kind.std_factor)
    assert one_step(x, 5)[2].tolist() == [[[0, 1, 2, 3, 29]]]


@ALL_BOUNDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unread_pages_stay_unseen(device: str, dtype: torch.dtype, kind: Kind) -> None:
    """NaN in the keys and values of unselected pages changes no result."""
    case = before_step(Shape(dtype, 128, 16, 2, 4, lengths=(700, 333, 20), kind=kind, seed=9))
    clean = one_step(on(case, device), 7)
    poisoned = one_step(on(case.poisoned(clean[2].cpu()), device), 7)
    for actual, expected in zip(poisoned, clean, strict=True):
        assert not actual.isnan().any()
        assert_same_bits(actual, expected)


@ALL_BOUNDS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["k_cache", "k", "v", "q"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faults_show_as_in_the_four(device: str, dtype: torch.dtype, name: str, value: float, kind: Kind) -> None:
    """NaN and infinities in a key, value or query affect their own sequence only."""
    case = before_step(Shape(dtype, 64, 16, 2, 4, lengths=(700, 333), kind=kind, seed=10))
    old_page = int(case.page_table[0, 5])
    where = {"k_cache": (old_page, 1, 3, 9), "k": (0, 0, 1, 5), "v": (0, 0, 1, 5), "q": (0, 4, 5)}[name]
    getattr(case, name)[where] = value
    if name == "k_cache":
        case.renew_bounds()
    out, _, pages = (x.cpu() for x in one_step(on(case, device), 7))
    assert out[1].isfinite().all()
    if math.isnan(value):
        assert out[0].isnan().any()
    if name == "k_cache" and (kind != KINDS["minmax"] or math.isnan(value)):
        assert 5 in pages[0, 1]
    for num_pages in (0, 7):
        assert_same_step(case, device, num_pages)


@ALL_BOUNDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_pages", [0, 40])
def test_reruns(device: str, num_pages: int, dtype: torch.dtype, kind: Kind) -> None:
    case = before_step(Shape(dtype, 128, 16, 2, 8, lengths=(3000, 64, 700), kind=kind, seed=11))
    first = one_step(on(case, device), num_pages)
    for _ in range(10):
        for actual, expected in zip(one_step(on(case, device), num_pages), first, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("options", "places"), [({"num_pages": 3}, 3), ({"num_pages": 0}, 0), ({"num_pages": 3, "dense_below": 65}, 5)]
)
def test_nothing_to_do(device: str, options: dict[str, Any], places: int) -> None:
    x = on(before_step(Shape(torch.float16, lengths=(20, 3))), device)
    none = {name: getattr(x, name)[:0] for name in ("q", "k", "v", "page_table", "start_lens", "seq_lens")}
    before = [t._base.clone() for t in caches(x)]
    out, lse, pages = one_step(x.having(**none), **options)
    assert (out.shape, lse.shape, pages.shape) == ((0, 4, 64), (0, 4), (0, 2, places))
    for actual, expected in zip(caches(x), before, strict=True):
        assert_same_bits(actual._base, expected)


@pytest.mark.gpu
class TestOnTheGPU:
    @ALL_BOUNDS
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_several_tiles_a_block(self, head_dim: int, kind: Kind) -> None:
        """More pages and chunks than resident blocks, so that each block takes several."""
        lengths = (9000 if head_dim <= 128 else 4500, 3001)
        shape = Shape(torch.bfloat16, head_dim, 8, 32, 1, lengths=lengths, kind=kind, seed=16)
        case = before_step(shape)
        for num_pages in (40, 200):
            assert_same_step(case, "cuda", num_pages)

    @ALL_BOUNDS
    @pytest.mark.parametrize("equal", [False, True])
    def test_more_pages_than_shared_memory_holds(self, equal: bool, kind: Kind) -> None:
        """More pages than shared memory holds keys or a table for, or a thread's word has bits for; with ties."""
        lengths = (8 * 13_000 - 3, 8 * 9_000, 8 * 6_145 - 7, 8 * 300)
        case = before_step(Shape(torch.bfloat16, 64, 8, 1, 2, lengths=lengths, kind=kind, seed=17))
        if equal:
            for x in (case.k_cache, case.k):
                x.fill_(0.5)
            ops.update_bounds(case.k_cache, case.k_bounds, case.page_table, case.start_lens, k_scales=case.k_scales)
        for num_pages in (3, 700):
            assert_same_step(case, "cuda", num_pages, sink_pages=1)

    @ALL_BOUNDS
    @pytest.mark.parametrize("keys", ["random", "equal", "broken"])
    def test_long_rows_are_selected_by_groups_of_pages(self, monkeypatch: Any, keys: str, kind: Kind) -> None:
        """More than 8,192 pages, 32 for each one read; forced pages begin and end inside groups of pages."""
        monkeypatch.delenv("QUEST_OPS_CHECK", raising=False)
        lengths = (8 * 25_000 - 5, 8 * 22_400 + 1, 8 * 8_209, 8 * 8_193 - 7, 8 * 8_192)
        case = before_step(Shape(torch.bfloat16, 64, 8, 1, 2, lengths=lengths, kind=kind, seed=18))
        if keys == "equal":
            for x in (case.k_cache, case.k):
                x.fill_(0.5)
            ops.update_bounds(case.k_cache, case.k_bounds, case.page_table, case.start_lens, k_scales=case.k_scales)
        if keys == "broken":
            case.page_table[:, 5::1000] = -1
        for num_pages, sink_pages, recent_pages in ((5, 0, 1), (256, 17, 18), (700, 0, 33), (1000, 16, 1)):
            assert_same_step(case, "cuda", num_pages, sink_pages=sink_pages, recent_pages=recent_pages)

    def test_counters_serve_one_step_after_the_other(self) -> None:
        """Of any number of sequences and heads, with idle sequences, and of steps that follow without a pause."""
        kind, counters = KINDS["mean-std-4-bit"], ops.new_counters(40, 16, "cuda")
        cases = [
            before_step(Shape(torch.bfloat16, 128, 16, heads, 16 // heads, lengths=lengths, kind=kind, seed=heads))
            for heads, lengths in ((1, (6000,)), (16, (40,) * 40), (2, (3000, 1, 500)), (8, (9000,)), (4, (70, 2000)))
        ]
        cases[3].start_lens[:] = cases[3].seq_lens[:] = 0
        steps = [(case, options) for options in OPTIONS for case in cases]
        expected = [one_step(on(case, "cuda"), **options) for case, options in steps]
        inputs = [(on(case, "cuda"), options) for case, options in steps * 10]
        torch.cuda.synchronize()
        results = [one_step(x, **options, counters=counters) for x, options in inputs]
        for i, result in enumerate(results):
            for actual, value in zip(result, expected[i % len(steps)], strict=True):
                assert_same_bits(actual, value)

    def test_steps_on_two_streams_do_not_wait_for_each_other(self) -> None:
        """Each launch has more blocks than fit beside those of the other."""
        kind = KINDS["minmax-8-bit"]
        case = before_step(Shape(torch.bfloat16, 128, 16, 8, 4, lengths=(6000,) * 8, kind=kind, seed=17))
        alone, streams = one_step(on(case, "cuda"), 128), [torch.cuda.Stream() for _ in range(2)]
        inputs = [[on(case, "cuda") for _ in range(10)] for _ in streams]
        torch.cuda.synchronize()
        results = []
        for i in range(10):
            for stream, cases in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    results.append(one_step(cases[i], 128))
        torch.cuda.synchronize()
        for result in results:
            for actual, expected in zip(result, alone, strict=True):
                assert_same_bits(actual, expected)

    @ALL_BOUNDS
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("kv_heads", [8, 2])
    @pytest.mark.parametrize("counted", [True, False])
    @pytest.mark.parametrize(
        "options",
        [
            {"num_pages": 64},
            {"num_pages": 64, "dense_below": 2000},
            {"num_pages": 0},
            {"num_pages": 0, "group_reduce": "soft", "recent_pages": 0},
        ],
        ids=str,
    )
    def test_one_launch(
        self, options: dict[str, Any], dtype: torch.dtype, kv_heads: int, counted: bool, kind: Kind
    ) -> None:
        """The documented conditions; without a single launch the tests above would compare nothing."""
        counters = ops.new_counters(2, kv_heads, "cuda") if counted else None
        x = on(before_step(Shape(dtype, 128, 16, kv_heads, 32 // kv_heads, lengths=(3000, 700), kind=kind)), "cuda")
        one_step(x, **options, counters=counters)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            one_step(x, **options, counters=counters)
            torch.cuda.synchronize()
        on_the_gpu = torch.autograd.DeviceType.CUDA
        kernels = [event.name for event in profile.events() if event.device_type == on_the_gpu]
        if not kernels:
            pytest.skip("the profiler sees no kernels here")
        assert ["decode_step" in kernel for kernel in kernels] == ([True] if counted else [False, True])
        assert counted or "clear_counters" in kernels[0]

    @ALL_BOUNDS
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("page", [-1, -(2**31), 2**31 - 1, "N"])
    def test_broken_page_tables(self, monkeypatch: Any, dtype: torch.dtype, page: int | str, kind: Kind) -> None:
        """A page that does not exist: in the middle, at the start, or under the new token."""
        monkeypatch.delenv("QUEST_OPS_CHECK", raising=False)
        case = before_step(Shape(dtype, 128, 16, 2, 4, lengths=(330, 200, 200, 90, 1), kind=kind, seed=12))
        page = len(case.k_cache) if page == "N" else page
        table = case.page_table.clone()
        table[0, 7] = table[1, 0] = table[2, 12] = table[2, 5] = table[4, 0] = page
        for num_pages in (0, 5, 30):
            for recent_pages, dense_below in ((0, 0), (1, 0), (1, 200)):
                options = {"recent_pages": recent_pages, "dense_below": dense_below}
                assert_same_step(case.having(page_table=table), "cuda", num_pages, **options)

    @ALL_BOUNDS
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_graph_replays_follow_the_lengths(self, options: dict[str, Any], dtype: torch.dtype, kind: Kind) -> None:
        """Captured once and replayed across page boundaries and past the budget or dense_below, equal to eager mode."""
        case = Case(Shape(dtype, 64, 8, 2, 4, lengths=(150, 140), kind=kind, seed=13))
        buffers = {
            "q": torch.zeros_like(case.q, device="cuda"),
            "k": torch.zeros(2, 1, 2, 64, dtype=dtype, device="cuda"),
            "v": torch.zeros(2, 1, 2, 64, dtype=dtype, device="cuda"),
            "start_lens": torch.zeros(2, dtype=torch.int32, device="cuda"),
            "seq_lens": torch.ones(2, dtype=torch.int32, device="cuda"),
        }
        replayed, eager, four = (case.on("cuda").having(**buffers) for _ in range(3))

        def load(starts: tuple[int, int]) -> None:
            buffers["q"].copy_(case.randn(*case.q.shape))
            for b, start in enumerate(starts):
                buffers["start_lens"][b], buffers["seq_lens"][b] = start, start + 1
                buffers["k"][b, 0].copy_(case.keys[b][start])
                buffers["v"][b, 0].copy_(case.values[b][start])

        load((0, 10))
        one_step(replayed, **options)  # warm up with the first step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = one_step(replayed, **options)
        for length in range(130):
            load((length, length + 10))
            graph.replay()
            results = (captured, one_step(eager, **options), four_steps(four, **options))
            for actual, plain, expected in zip(*results, strict=True):
                assert_same_bits(actual, plain)
                assert_same_bits(actual, expected)
        for actual, plain, expected in zip(caches(replayed), caches(eager), caches(four), strict=True):
            assert_same_bits(actual._base, plain._base)
            assert_same_bits(actual._base, expected._base)

    @ALL_BOUNDS
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_stream(self, dtype: torch.dtype, kind: Kind) -> None:
        """On a side stream the step runs after the work queued there before it."""
        case = before_step(Shape(dtype, 128, 16, 2, 4, lengths=(3000, 100), kind=kind, seed=14))
        x, late = on(case, "cuda"), on(case, "cuda")
        written = ("q", "k", "v", "k_cache", "k_bounds", "start_lens", "seq_lens")
        values = {name: getattr(late, name).clone() for name in written}
        for name in written:
            getattr(late, name).zero_()
        expected = one_step(x, 20)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for name, value in values.items():
                getattr(late, name).copy_(value)
            actual = one_step(late, 20)
            sums = [t.double().nan_to_num().sum() for t in actual]
        stream.synchronize()
        for got, total, value in zip(actual, sums, expected, strict=True):
            assert_same_bits(got, value)
            assert total == value.double().nan_to_num().sum()
