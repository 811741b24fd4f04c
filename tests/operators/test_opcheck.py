"""PyTorch's requirements of an operator: opcheck, fake tensors, torch.compile with symbolic shapes, no backward."""

from collections.abc import Callable

import pytest
import torch
from helpers.operator_cases import DTYPES, KINDS, LAYOUTS, Case, Shape, assert_same_bits, place
from quest_ops import ops
from quest_ops._library import OPERATORS
from quest_ops._library import ops as raw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def arguments(name: str, dtype: torch.dtype, layout: str, full: bool, device: str) -> tuple[tuple, dict]:
    """Arguments of an operator: with all optional ones, 8-bit bounds and new tokens, or without."""
    layouts = (LAYOUTS.index(layout),) * 4
    kind = KINDS["minmax-8-bit" if full else "minmax"]
    x = Case(Shape(dtype, new_tokens=2 if full else 0, lengths=(37, 18), layouts=layouts, kind=kind)).on(device)
    paging = (x.page_table, x.seq_lens)
    scales = {"k_scales": x.k_scales} if full else {}
    few = torch.tensor([2, 1], dtype=torch.int32, device=device)
    if name == "append_kv":
        k, v = (place(torch.randn(2, 3, 2, 64).to(dtype), layout, device) for _ in "kv")
        before = (x.page_table, x.seq_lens - 3)
        return (k, v, x.k_cache, x.v_cache, x.k_bounds, *before), {"new_lens": few, **scales} if full else {}
    if name == "update_bounds":
        return (x.k_cache, x.k_bounds, *paging), {"first_token": few * 16, **scales} if full else {}
    if name == "estimate":
        return (x.q, x.k_bounds, *paging, 16), {"new_lens": few, **scales} if full else {}
    rows = x.q.shape[:-1]
    codes = (
        place(torch.zeros(len(x.k_cache), 2, 16, 16, dtype=torch.uint8), layout, device),
        place(torch.ones(len(x.k_cache), 2, 16), layout, device),
    )
    lists = torch.tensor([0, 1, -1], dtype=torch.int32, device=device).expand(*rows, 3).contiguous()
    if name == "append_codes":
        k = place(torch.randn(2, 3, 2, 64).to(dtype), layout, device)
        return (k, *codes, x.page_table, x.seq_lens - 3), {"new_lens": few} if full else {}
    if name == "rerank_pages":
        options = {"token_reduce": 1, "scale": 0.3, "new_lens": few} if full else {}
        return (x.q, *codes, *paging, lists), options
    if name == "decode_step":
        T = 2 if full else 1
        k, v = (place(torch.randn(2, T, 2, 64).to(dtype), layout, device) for _ in "kv")
        options = {"group_reduce": 0, "sink_pages": 1, "recent_pages": 0, "scale": 0.3, **scales} if full else {}
        news = few if full else T
        if full:
            options |= {"new_lens": few, "budgets": few}
        return (x.q, k, v, x.k_cache, x.v_cache, x.k_bounds, x.page_table, x.seq_lens - news, x.seq_lens, 2), options
    if name == "topk_pages":
        scores = place(torch.randn(*rows, 4), layout, device)
        options = {"group_reduce": 3, "sink_pages": 1, "recent_pages": 0, "scale": 0.5} if full else {}
        if full:
            options |= {"new_lens": few, "budgets": few}
        return (scores, x.seq_lens, 16, 2, 2), options
    return (x.q, x.k_cache, x.v_cache, *paging), {"pages": lists, "scale": 0.3, "new_lens": few} if full else {}


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize(
    ("dtype", "layout"), list(zip(DTYPES, ("sliced", "transposed", "contiguous"), strict=True)), ids=str
)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device: str, name: str, dtype: torch.dtype, layout: str, full: bool) -> None:
    args, kwargs = arguments(name, dtype, layout, full, device)
    torch.library.opcheck(getattr(raw, name).default, args, kwargs)


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "every_page", "dense_below"),
    [("topk_pages", False, 36), ("decode_step", False, 36), ("decode_step", True, 0), ("decode_step", True, 36)],
)
def test_opcheck_of_dense_steps(
    device: str, name: str, every_page: bool, dense_below: int, dtype: torch.dtype, full: bool
) -> None:
    args, kwargs = arguments(name, dtype, "contiguous", full, device)
    kwargs = {**kwargs, "dense_below": dense_below}
    if every_page:
        args, kwargs = (*args[:-1], 0), {**kwargs, "budgets": None}
    torch.library.opcheck(getattr(raw, name).default, args, kwargs)


def pipeline(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_bounds: Tensor, table: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A model's decode step, between operations that the compiler can fuse."""
    ops.append_kv(k * 1.5, v, k_cache, v_cache, k_bounds, table, before)
    lengths = before + k.shape[1]
    scores = ops.estimate(q * 2, k_bounds, table, lengths, k_cache.shape[2])
    pages = ops.topk_pages(scores, lengths, k_cache.shape[2], 3, k_cache.shape[1])
    out, lse = ops.sparse_decode(q * 2, k_cache, v_cache, table, lengths, pages)
    return pages, out + 1, lse


def step(dtype: torch.dtype, lengths: tuple[int, ...], device: str) -> list[Tensor]:
    x = Case(Shape(dtype, new_tokens=2, lengths=lengths)).on(device)
    k, v = (torch.randn(len(lengths), 2, 2, 64, device=device).to(dtype) for _ in "kv")
    caches = (x.k_cache.contiguous(), x.v_cache.contiguous(), x.k_bounds.contiguous())
    return [x.q.contiguous(), k, v, *caches, x.page_table.contiguous(), x.seq_lens - 2]


def in_one(*inputs: Tensor, num_pages: int = 3, dense_below: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same step by decode_step."""
    q, k, v, *caches, table, before = inputs
    lengths = before + k.shape[1]
    out, lse, pages = ops.decode_step(
        q * 2, k * 1.5, v, *caches, table, before, lengths, num_pages, dense_below=dense_below
    )
    return pages, out + 1, lse


def short_sequences_densely(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return in_one(*inputs, dense_below=40)


def every_page(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return in_one(*inputs, num_pages=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("how", "eager"),
    [
        (pipeline, pipeline),
        (in_one, pipeline),
        (short_sequences_densely, short_sequences_densely),
        (every_page, every_page),
    ],
)
def test_compiled_whole_and_once_for_all_sizes(
    device: str, how: Callable[..., tuple[Tensor, ...]], eager: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    compiled = torch.compile(how, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(*lengths: int) -> None:
        inputs = step(dtype, lengths, device)
        copies = [x.clone() for x in inputs]
        for actual, expected in zip(compiled(*inputs), eager(*copies), strict=True):
            assert_same_bits(actual, expected)
        for actual, expected in zip(inputs, copies, strict=True):
            assert_same_bits(actual, expected)

    torch.compiler.reset()
    # All sizes differ, since the compiler would assume that equal ones stay equal.
    check(37, 90, 5)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(5, 130, 64, 2, 8)
        check(17, 16, 33, 200, 2, 3)


@pytest.mark.parametrize("new_tokens", [0, 3])
@pytest.mark.parametrize("reduce", ["none", "max"])
def test_fake_tensors_have_the_shapes_of_real_ones(device: str, new_tokens: int, reduce: str) -> None:
    x = Case(Shape(torch.bfloat16, new_tokens=new_tokens)).on(device)

    def results(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_bounds: Tensor, *paging: Tensor) -> tuple[Tensor, ...]:
        scores = ops.estimate(q, k_bounds, *paging, 16)
        pages = ops.topk_pages(scores, paging[1], 16, 2, 2, reduce)
        k = torch.empty(2, max(1, new_tokens), 2, 64, dtype=q.dtype, device=q.device)
        before = paging[1] - k.shape[1]
        more = ops.topk_pages(scores, paging[1], 16, 2, 2, reduce, dense_below=50)
        step = (q, k, k, k_cache, v_cache, k_bounds, paging[0], before, paging[1])
        steps = [
            ops.decode_step(*step, num_pages, reduce, dense_below=dense_below)
            for num_pages, dense_below in ((2, 0), (2, 50), (0, 0), (0, 50))
        ]
        attention = ops.sparse_decode(q, k_cache, v_cache, *paging, pages)
        return scores, pages, more, *attention, *(result for results in steps for result in results)

    inputs = (x.q, x.k_cache, x.v_cache, x.k_bounds, x.page_table, x.seq_lens)
    with FakeTensorMode() as mode:
        fakes = results(*(mode.from_tensor(tensor) for tensor in inputs))
    for fake, real in zip(fakes, results(*inputs), strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        assert fake.stride() == real.stride()


def test_backward_is_refused(device: str) -> None:
    x = Case(Shape()).on(device)
    q = x.q.clone().requires_grad_()
    scores = ops.estimate(q, x.k_bounds, x.page_table, x.seq_lens, 16)
    with pytest.raises(RuntimeError, match="estimate has no backward"):
        scores[..., 0].sum().backward()
    out, _ = ops.sparse_decode(q, x.k_cache, x.v_cache, x.page_table, x.seq_lens)
    with pytest.raises(RuntimeError, match="sparse_decode has no backward"):
        out.sum().backward()
    k = torch.randn(2, 1, 2, 64, device=device)
    caches = (x.k_cache, x.v_cache, x.k_bounds)
    for inputs in ((q, k), (x.q, k.clone().requires_grad_())):
        out, lse, _ = ops.decode_step(*inputs, k, *caches, x.page_table, x.seq_lens - 1, x.seq_lens, 2)
        for result in (out, lse):
            with pytest.raises(RuntimeError, match="decode_step has no backward"):
                result.sum().backward()
    assert not any(cache.requires_grad for cache in caches)
