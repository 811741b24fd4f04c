"""The checks of the fake kernels under torch.compile and torch.export: eager's sentences, and no size made static."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quest_ops import ops
from torch import Tensor, nn
from torch.export import Dim

HKV, S, D = 2, 16, 64


class Step(nn.Module):
    """Six operators over caches of their own."""

    def forward(
        self, q: Tensor, k: Tensor, caches: list[Tensor], page_table: Tensor, start_lens: Tensor
    ) -> tuple[Tensor, ...]:
        k_cache, v_cache, k_bounds = caches
        lens = start_lens + 1
        ops.append_kv(k, k, *caches, page_table, start_lens)
        ops.update_bounds(k_cache, k_bounds, page_table, lens, start_lens)
        scores = ops.estimate(q, k_bounds, page_table, lens, S)
        pages = ops.topk_pages(scores, lens, S, 2, HKV)
        out, _ = ops.sparse_decode(q, k_cache, v_cache, page_table, lens, pages)
        steps = [
            ops.decode_step(q, k, k, *caches, page_table, start_lens, lens, num_pages, dense_below=dense_below)
            for num_pages, dense_below in ((2, 0), (2, 100), (0, 0))
        ]
        return scores, pages, out, *(result for step in steps for result in step)


def inputs(B: int, N: int, P: int, device: str) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(B)
    sizes = ((B, 4, D), (B, 1, HKV, D), (N, HKV, S, D), (N, HKV, S, D), (N, HKV, 2, D))
    q, k, *caches = (torch.randn(size, generator=random).to(device) for size in sizes)
    table = torch.arange(B * P, dtype=torch.int32, device=device).view(B, P) % N
    return q, k, caches, table, torch.full((B,), P * S - 1, dtype=torch.int32, device=device)


def copy(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else [y.clone() for y in x] for x in given)


def assert_same(step: Any, given: tuple[Any, ...]) -> None:
    copies = copy(given)
    for actual, expected in zip(step(*given), Step()(*copies), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(given[2], copies[2])


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_batch_pages_and_capacity_stay_symbolic_in_export(device: str, strict: bool) -> None:
    B, N, P = Dim("batch"), Dim("pages"), Dim("capacity")
    shapes = ({0: B}, {0: B}, [{0: N}] * 3, {0: B, 1: P}, {0: B})
    program = torch.export.export(Step(), inputs(3, 40, 5, device), dynamic_shapes=shapes, strict=strict)
    for sizes in ((3, 40, 5), (2, 17, 4), (7, 90, 11)):
        assert_same(program.module(), inputs(*sizes, device))


def test_batch_pages_and_capacity_compile_once(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(compiled, inputs(3, 40, 5, device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in ((2, 17, 4), (7, 90, 11)):
            assert_same(compiled, inputs(*sizes, device))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("key", "bad", "message"),
    [
        ("q", torch.zeros(3, 4, 64, dtype=torch.float64), "q must be float32, float16 or bfloat16, got Double"),
        ("q", torch.zeros(3, 5, 64), "q's heads must be a positive multiple of k_bounds' heads, got 5 and 2"),
        ("q", torch.zeros(2, 4, 64), r"page_table must have shape \[B, P\] with 2 in dimension 0"),
        ("q", torch.zeros(3, 4, 72), "q must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got 72"),
        ("page_table", torch.zeros(3, 5, dtype=torch.int64), "page_table must be int32, got Long"),
        ("page_table", torch.zeros(3, dtype=torch.int32), r"page_table must have shape \[B, P\], got \[3\]"),
        ("seq_lens", torch.zeros(4, dtype=torch.int32), r"seq_lens must have shape \[B\] with 3 in dimension 0"),
        ("seq_lens", torch.zeros(3, dtype=torch.int32, device="meta"), "seq_lens must be on cpu like q, got meta"),
    ],
)
def test_an_error_under_compile_says_what_eager_says(key: str, bad: Tensor, message: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    q, _, caches, table, lens = inputs(3, 40, 5, "cpu")
    call = {"q": q, "k_bounds": caches[2], "page_table": table, "seq_lens": lens, "page_size": S, key: bad}
    with pytest.raises(RuntimeError, match=message):
        ops.estimate(**call)
    compiled = torch.compile(ops.estimate, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pytest.raises(RuntimeError, match=message):
        compiled(**call)
