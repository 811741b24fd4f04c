"""Operators that write to views of larger tensors, compiled: with one pool size, a second one, and symbolic ones.

Inductor (torch 2.13) takes a storage offset that it computes from symbolic sizes for 0 where an operator writes. The
fake kernels make such sizes static. Results are those of eager mode in every layout that engines use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.operator_cases import assert_same_bits
from quest_ops import ops
from torch import Tensor, nn
from torch.export import Dim

L, HKV, S, D = 3, 2, 16, 64
LAYER = 2  # the last layer of a pool: its offset is a multiple of the pool's size

Views = Callable[[Tensor], tuple[Tensor, Tensor]]

# Name -> the shape of the joint tensor for N pages, and its keys and values [N, Hkv, S, D].
LAYOUTS: dict[str, tuple[Callable[[int], tuple[int, ...]], Views]] = {
    "pool [L, 2, N, Hkv, S, D]": (lambda n: (L, 2, n, HKV, S, D), lambda x: (x[LAYER, 0], x[LAYER, 1])),
    "pool [2, L, N, Hkv, S, D]": (lambda n: (2, L, n, HKV, S, D), lambda x: (x[0, LAYER], x[1, LAYER])),
    "[2, N, Hkv, S, D]": (lambda n: (2, n, HKV, S, D), lambda x: x.unbind(0)),
    "[N, 2, Hkv, S, D]": (lambda n: (n, 2, HKV, S, D), lambda x: x.unbind(1)),
    "[N, Hkv, S, 2 * D]": (lambda n: (n, HKV, S, 2 * D), lambda x: x.split(D, -1)),
    "[2, N, S, Hkv, D]": (lambda n: (2, n, S, HKV, D), lambda x: x.transpose(2, 3).unbind(0)),
    "[N, 2, S, Hkv, D]": (lambda n: (n, 2, S, HKV, D), lambda x: x.transpose(2, 3).unbind(1)),
    "pool [L, N, S, 2, Hkv, D]": (lambda n: (L, n, S, 2, HKV, D), lambda x: x[LAYER].movedim(1, 3).unbind(2)),
}
# Here no offset depends on N, so that a symbolic N stays symbolic.
FREE = ("[N, 2, Hkv, S, D]", "[N, Hkv, S, 2 * D]", "[N, 2, S, Hkv, D]")
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


class Step(nn.Module):
    """One call of a writing operator over views of the given tensors.

    The bounds are one layer of a pool [L, N, Hkv, 2, D], or a tensor of their own for the layouts ``FREE``.
    """

    def __init__(self, name: str, layout: str) -> None:
        super().__init__()
        self.name, self.views = name, LAYOUTS[layout][1]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, joint: Tensor, bounds: Tensor, page_table: Tensor, start_lens: Tensor
    ) -> Tensor:
        k_cache, v_cache = self.views(joint)
        k_bounds, lens = bounds[LAYER] if bounds.dim() == 5 else bounds, start_lens + 1
        if self.name == "decode_step":
            return ops.decode_step(q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, lens, 2)[0] * 2
        if self.name == "append_kv":
            ops.append_kv(k * 2, v, k_cache, v_cache, k_bounds, page_table, start_lens)
        else:
            k_cache.mul_(1.5)
            ops.update_bounds(k_cache, k_bounds, page_table, lens)
        return ops.sparse_decode(q, k_cache, v_cache, page_table, lens)[0] * 2


def inputs(layout: str, pages: int, device: str, rows: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(pages)
    joint = torch.randn(LAYOUTS[layout][0](pages), generator=random)
    new = [torch.randn(rows, *size, generator=random) for size in ((4, D), (1, HKV, D), (1, HKV, D))]
    table = torch.randperm(pages, generator=random)[: rows * 3].int().view(rows, 3)
    lens = torch.tensor([20, 37, 5, 31][:rows], dtype=torch.int32)
    bounds = torch.zeros(pages, HKV, 2, D) if layout in FREE else torch.zeros(L, pages, HKV, 2, D)
    return [x.to(device) for x in (*new, joint, bounds, table, lens)]


def assert_same_as_eager(step: Any, eager: nn.Module, given: list[Tensor]) -> None:
    copies = [x.clone() for x in given]
    torch.testing.assert_close(step(*given), eager(*copies), rtol=1e-5, atol=1e-5)
    for actual, expected in zip(given, copies, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("decode_step", layout) for layout in LAYOUTS),
        *((name, layout) for name in ("append_kv", "update_bounds") for layout in ("[2, N, Hkv, S, D]", FREE[0])),
    ],
)
def test_compiled(device: str, name: str, layout: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    eager = Step(name, layout)
    compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for pages, rows in ((8, 2), (12, 3)):
            assert_same_as_eager(compiled, eager, inputs(layout, pages, device, rows))


def exported(layout: str, name: str, device: str, strict: bool, symbolic: bool) -> Any:
    """The exported step, or None where torch refuses a symbolic number of pages, since an offset depends on it."""
    pages = Dim("pages", min=6, max=4096) if symbolic else None
    given = inputs(layout, 8, device)
    places = [{i: pages for i, size in enumerate(x.shape) if size == 8 and symbolic} for x in given[3:5]]
    shapes = (None, None, None, *places, None, None)
    try:
        with torch.no_grad():
            return torch.export.export(Step(name, layout), tuple(given), dynamic_shapes=shapes, strict=strict)
    except (torch._dynamo.exc.UserError, ValueError) as error:
        if symbolic and layout not in FREE and "pages" in str(error):
            return None
        raise


@pytest.mark.slow
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("name", ["append_kv", "update_bounds", "decode_step"])
@EACH_LAYOUT
def test_exported(device: str, layout: str, name: str, strict: bool, symbolic: bool) -> None:
    program = exported(layout, name, device, strict, symbolic)
    if program is not None:
        eager = Step(name, layout)
        for pages in (8, 12) if symbolic else (8,):
            assert_same_as_eager(program.module(), eager, inputs(layout, pages, device))


@pytest.mark.slow
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.usefixtures("aotinductor")
@EACH_LAYOUT
def test_aotinductor(device: str, tmp_path: Path, layout: str, symbolic: bool) -> None:
    program = exported(layout, "decode_step", device, False, symbolic)
    if program is not None:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
        step = torch._inductor.aoti_load_package(path)
        for pages in (8, 12) if symbolic else (8,):
            assert_same_as_eager(step, Step("decode_step", layout), inputs(layout, pages, device))
