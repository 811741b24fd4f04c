"""append_codes and rerank_pages: keys in two bits a dimension, and scores of listed pages from them."""

import contextlib
import math
import re
from typing import Any

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import (
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    PAGE_SIZES,
    Case,
    Shape,
    assert_accurate,
    assert_exact,
    assert_same_bits,
    place,
    place_far_apart,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st
from quest_ops import ops, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

UNREAD_BYTE = 0xA5


class CodedCase(Case):
    """A case with the reference's codes of its keys. Places that hold no token have NaN scales."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        N, Hkv, S, D = self.k_cache.shape
        self.k_codes = torch.full((N, Hkv, S, D // 4), UNREAD_BYTE, dtype=torch.uint8)
        self.code_scales = torch.full((N, Hkv, S), math.nan)
        for b, keys in enumerate(self.keys):
            self.k_codes, self.code_scales = reference.append_codes(
                keys[None],
                self.k_codes,
                self.code_scales,
                self.page_table[b : b + 1],
                torch.zeros(1, dtype=torch.int32),
            )

    def arguments(self, device: str, pages: Tensor) -> tuple[Tensor, ...]:
        x, layout = self.on(device), LAYOUTS[self.shape.layouts[1]]
        codes = place(self.k_codes, layout, device), place(self.code_scales, layout, device)
        return x.q, *codes, x.page_table, x.seq_lens, place(pages, "sliced", device)


def check(case: CodedCase, device: str, pages: Tensor, token_reduce: str = "max") -> None:
    scale = 0.2
    actual = ops.rerank_pages(*case.arguments(device, pages), token_reduce, scale)
    assert actual.dtype == torch.float32
    where = (case.code_scales, case.page_table, case.seq_lens, pages, token_reduce, scale)
    rotated, levels = reference.hadamard(case.q.float()).to(case.q.dtype), reference.unpack_codes(case.k_codes)
    (like,) = torch_baseline.in_several_orders(torch_baseline.rerank_pages, rotated, levels, *where)
    assert_accurate(actual, reference.rerank_pages(case.q, case.k_codes, *where), like, case.shape.dtype)


@given(shapes(), st.booleans(), st.booleans(), st.sampled_from(["max", "lse"]))
def test_scores_meet_the_reference(device: str, shape: Shape, per_head: bool, shuffled: bool, reduce: str) -> None:
    case = CodedCase(shape)
    check(case, device, case.random_pages(shape.capacity, per_head, shuffled), reduce)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("reduce", ["max", "lse"])
def test_every_kind_of_page(device: str, dtype: torch.dtype, head_dim: int, page_size: int, reduce: str) -> None:
    lengths = (5 * page_size, 3 * page_size + 1, 0, 1, 6 * page_size - 1)
    case = CodedCase(Shape(dtype, head_dim, page_size, 2, 3, new_tokens=2, lengths=lengths, seed=1))
    check(case, device, case.random_pages(case.shape.capacity), reduce)


@pytest.mark.parametrize("group", [1, 4, 8, 9, 20])
@pytest.mark.parametrize("page_size", [4, 16, 128])
def test_many_pages(device: str, group: int, page_size: int) -> None:
    """More entries than a block takes, of several groups."""
    case = CodedCase(Shape(torch.bfloat16, 128, page_size, 2, group, lengths=(4100, 700), spare_pages=3, seed=2))
    check(case, device, case.random_pages(case.shape.capacity))


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_whose_terms_cancel(head_dim: int, magnitude: float) -> None:
    """On the CPU they are off by two roundings of the score, and not by those of its terms, a billion times larger."""
    torch.manual_seed(0)
    B, Hkv, S = 50, 2, 4
    k_codes = torch.randint(0, 256, (B, Hkv, 1, head_dim // 4), dtype=torch.uint8).repeat(1, 1, S, 1)
    code_scales = torch.rand(B, Hkv, 1).repeat(1, 1, S)
    levels = reference.unpack_codes(k_codes)[:, :, 0].double()
    rotated = torch.randn(B, Hkv, head_dim, dtype=torch.float64)
    rotated -= (rotated * levels).sum(-1, True) / levels.square().sum(-1, True) * levels
    q = (magnitude * reference.hadamard(rotated)).float()
    page_table, seq_lens = torch.arange(B, dtype=torch.int32)[:, None], torch.full((B,), S, dtype=torch.int32)
    pages = torch.zeros(B, Hkv, 1, dtype=torch.int32)
    args = (q, k_codes, code_scales, page_table, seq_lens, pages)
    exact = reference.rerank_pages(*args)[..., 0]
    terms = (reference.hadamard(q.double()) * levels).abs().sum(-1) * code_scales[:, :, 0]
    assert bool((exact.abs() < 1e-7 * terms).all())
    error = (ops.rerank_pages(*args)[..., 0] - exact).abs()
    assert bool((error <= 2**-23 * exact.abs() + 2**-34 * terms).all())


@given(shapes())
def test_codes_meet_the_reference(device: str, shape: Shape) -> None:
    """Equal but for elements within rounding of a border, and with the same scale to rounding."""
    case = CodedCase(shape)
    N, Hkv, S, D = case.k_cache.shape
    layout = LAYOUTS[shape.layouts[1]]
    k_codes = place(torch.full((N, Hkv, S, D // 4), UNREAD_BYTE, dtype=torch.uint8), layout, device)
    code_scales = place(torch.full((N, Hkv, S), math.nan), layout, device)
    most = max(shape.lengths)
    k = torch.zeros(len(shape.lengths), most, Hkv, D, dtype=shape.dtype)
    for b, keys in enumerate(case.keys):
        k[b, : len(keys)] = keys
    # Sequences that share pages write the same codes there, so they come one after another.
    for b in range(len(shape.lengths)):
        one = slice(b, b + 1)
        ops.append_codes(
            place(k[one], LAYOUTS[shape.layouts[0]], device),
            k_codes,
            code_scales,
            place(case.page_table[one], "sliced", device),
            torch.zeros(1, dtype=torch.int32, device=device),
            place(case.seq_lens[one], "unaligned", device),
        )
    written = ~case.code_scales.isnan()
    assert_exact(code_scales.cpu().isnan(), ~written)
    torch.testing.assert_close(code_scales.cpu()[written], case.code_scales[written], rtol=1e-5, atol=0)
    actual, expected = (reference.unpack_codes(x)[written] for x in (k_codes.cpu(), case.k_codes))
    assert bool((k_codes.cpu()[~written] == UNREAD_BYTE).all())
    rotated = reference.hadamard(case.k_cache.double())[written]
    step = 2 * case.code_scales.double()[written][:, None]
    distance = torch.stack([(rotated - border * step).abs() for border in (-1, 0, 1)]).amin(0)
    assert bool((actual == expected)[distance > 1e-5 * step].all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_both_devices_write_the_same_codes(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(0)
    k = (torch.randn(2, 300, 2, head_dim) * torch.rand(2, 300, 2, 1) * 5).to(dtype)
    k[0, 3] = 0
    k[1, 5, 0, 7] = math.nan
    k[1, 6, 1, 9] = math.inf
    table, lens = torch.randperm(40).int().view(2, 20), torch.tensor([0, 17], dtype=torch.int32)
    results = []
    for device in ("cpu", "cuda"):
        codes = torch.zeros(40, 2, 16, head_dim // 4, dtype=torch.uint8, device=device)
        scales = torch.zeros(40, 2, 16, device=device)
        ops.append_codes(k.to(device), codes, scales, table.to(device), lens.to(device))
        results.append((codes.cpu(), scales.cpu()))
    for cpu, cuda in zip(*results, strict=True):
        assert_same_bits(cuda, cpu)


def test_keys_that_are_not_finite_show(device: str) -> None:
    case = CodedCase(Shape(torch.float32, lengths=(40,), seed=3))
    k = case.keys[0][None].clone()
    k[0, 18, 1, 5] = math.inf
    N, Hkv, S, D = case.k_cache.shape
    codes, scales = torch.zeros(N, Hkv, S, D // 4, dtype=torch.uint8), torch.zeros(N, Hkv, S)
    x = case.on(device)
    codes, scales = codes.to(device), scales.to(device)
    ops.append_codes(k.to(device), codes, scales, x.page_table, torch.zeros_like(x.seq_lens))
    pages = torch.tensor([[[0, 1, 2], [0, 1, 2]]], dtype=torch.int32, device=device)
    nan = ops.rerank_pages(x.q, codes, scales, x.page_table, x.seq_lens, pages).isnan().cpu()
    expected = torch.zeros_like(nan)
    expected[0, 2:, 1] = True  # the heads of KV head 1
    assert_exact(nan, expected)


def test_a_result_does_not_depend_on_the_batch_or_the_list(device: str) -> None:
    case = CodedCase(Shape(torch.bfloat16, 128, 16, 2, 4, lengths=(900, 333, 40), seed=4))
    pages = case.random_pages(case.shape.capacity)
    x = case.arguments(device, pages)
    together = ops.rerank_pages(*x)
    for b in range(3):
        q, codes, scales, table, lens, lists = x
        one = slice(b, b + 1)
        alone = ops.rerank_pages(q[one], codes, scales, table[one], lens[one], lists[one].flip(-1))
        assert_same_bits(alone, together[one])


def test_two_stages_find_the_best_pages(device: str) -> None:
    """With every page listed and keys of two bits, the best page by its codes is that of the largest q.k, nearly."""
    case = CodedCase(Shape(torch.float32, 128, 16, 1, 1, lengths=(16 * 40,), spare_pages=0, seed=5))
    position = 16 * 23 + 3
    case.keys[0][position, 0] = 3 * case.q[0, 0] / case.q[0, 0].norm() * 128**0.5
    k_codes, code_scales = (t.to(device) for t in (case.k_codes, case.code_scales))
    x = case.on(device)
    ops.append_codes(case.keys[0][None].to(device), k_codes, code_scales, x.page_table, torch.zeros_like(x.seq_lens))
    everything = torch.arange(40, dtype=torch.int32, device=device).view(1, 1, 40)
    scores = ops.rerank_pages(x.q, k_codes, code_scales, x.page_table, x.seq_lens, everything)
    best = ops.topk_pages(scores, x.seq_lens, 16, 2, 1)
    assert best.flatten().tolist() == [23, 39]


def test_pools_past_2_31_bytes(device: str) -> None:
    case = CodedCase(Shape(dtype=torch.float16, lengths=(40, 33), spare_pages=0))
    pages = case.random_pages(case.shape.capacity)
    q, codes, scales, table, lens, lists = case.arguments(device, pages)
    near = ops.rerank_pages(q, codes, scales, table, lens, lists)
    assert_same_bits(ops.rerank_pages(q, place_far_apart(case.k_codes, device), scales, table, lens, lists), near)


def test_nothing_to_do(device: str) -> None:
    case = CodedCase(Shape(lengths=(20, 3)))
    q, codes, scales, table, lens, pages = case.arguments(device, case.random_pages(2))
    none = ops.rerank_pages(q[:0], codes, scales, table[:0], lens[:0], pages[:0])
    assert none.shape == (0, 4, 3)
    assert bool((ops.rerank_pages(q, codes, scales, table, lens, pages[..., :0]) == -math.inf).all())
    before = codes.clone()
    ops.append_codes(torch.zeros(2, 0, 2, 64, device=device), codes, scales, table, lens)
    assert_same_bits(codes, before)


BAD = {
    "dtype of the codes": ({"k_codes": lambda t: t.to(torch.int8)}, "k_codes must be uint8, got Char"),
    "bytes of the codes": (
        {"k_codes": lambda t: t[..., :-1]},
        "k_codes must have shape [N, Hkv, S, D / 4] with 16 in dimension 3 (head_dim, four dimensions a byte), got "
        "[9, 2, 16, 15]",
    ),
    "dtype of the scales": ({"code_scales": lambda t: t.half()}, "code_scales must be float32, got Half"),
    "tokens of the scales": (
        {"code_scales": lambda t: t[:, :, :-1]},
        "code_scales must have shape [N, Hkv, S] with 16 in dimension 2 (the tokens of k_codes), got [9, 2, 15]",
    ),
    "no list": ({"pages": lambda _: None}, "pages must be a tensor, got None"),
    "heads of the lists": (
        {"pages": lambda t: t[:, :1]},
        "pages must have shape [B, Hs, K] like q's [B, Hq, D] with Hs 2 (a list a KV head) or 4 (a list a query head), "
        "got [2, 1, 3] for q [2, 4, 64]",
    ),
    "a scale of zero": ({"scale": lambda _: 0.0}, "scale must be above 0, got 0"),
    "a reduction of another number": ({"token_reduce": lambda _: 2}, "token_reduce must be 0 (max) or 1 (lse), got 2"),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(device: str, name: str, fake: bool) -> None:
    if fake and name == "no list":
        pytest.skip("PyTorch itself refuses None where tensors are fake")
    case = CodedCase(Shape(lengths=(37, 20)))
    names = ("q", "k_codes", "code_scales", "page_table", "seq_lens", "pages")
    good: dict[str, Any] = dict(zip(names, case.arguments(device, case.random_pages(3)), strict=True))
    good |= {"token_reduce": 0, "scale": 1.0}
    changes, message = BAD[name]
    bad = {key: change(good[key]) for key, change in changes.items()}
    call = {**good, **bad}
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    if isinstance(mode, FakeTensorMode):
        call = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in call.items()}
    with mode, pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.quest.rerank_pages(**call)


def test_a_page_that_does_not_exist(device: str, monkeypatch: Any) -> None:
    """An error where numbers are checked, and NaN of that page elsewhere."""
    case = CodedCase(Shape(torch.bfloat16, lengths=(100,)))
    everything = torch.arange(7, dtype=torch.int32).expand(1, 2, 7)
    case.page_table[0, 3] = 1 << 30
    x = case.arguments(device, everything)
    monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    with pytest.raises(RuntimeError, match="page_table must hold physical pages 0 to .*got 1073741824 .*page 3"):
        ops.rerank_pages(*x)
    monkeypatch.delenv("QUEST_OPS_CHECK")
    if device == "cuda":
        nan = ops.rerank_pages(*x).isnan().cpu()
        assert_exact(nan, torch.arange(nan.shape[-1]).expand(nan.shape) == 3)
