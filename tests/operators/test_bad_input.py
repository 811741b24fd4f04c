"""Wrong arguments raise an error that names the argument and its value, before anything is written.

Wrong values that a GPU does not check never lead a kernel outside its tensors.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.operator_cases import KINDS, Case, Shape, assert_same_bits, place
from quest_ops import ops, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

Arguments = dict[str, Any]
OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(ops, name)
    for name in ("append_kv", "update_bounds", "estimate", "topk_pages", "sparse_decode", "decode_step")
}
SCALED = ("append_kv", "update_bounds", "estimate", "decode_step")
WRITTEN = ("k_cache", "v_cache", "k_bounds", "k_scales")


def arguments(name: str, device: str, int8: bool = False) -> Arguments:
    """Right arguments of an operator, all given: B = 2, Hq = 4, Hkv = 2, D = 64, S = 16, P = 4, N = 9.

    k_scales is given with 8-bit bounds only. decode_step gets float16, which a single launch supports.
    """
    if int8:
        good = arguments(name, device)
        x = Case(Shape(good["k_bounds"].dtype, lengths=(37, 20), kind=KINDS["minmax-8-bit"])).on(device)
        return {**good, "k_bounds": x.k_bounds, "k_scales": x.k_scales}
    case = Case(Shape(torch.float16 if name == "decode_step" else torch.float32, lengths=(37, 20)))
    x = case.on(device)
    few = place(torch.tensor([2, 1], dtype=torch.int32), "contiguous", device)
    k, v = (place(torch.randn(2, 3, 2, 64), "contiguous", device) for _ in "kv")
    caches = {"k_cache": x.k_cache, "v_cache": x.v_cache, "k_bounds": x.k_bounds}
    paging = {"page_table": x.page_table, "seq_lens": x.seq_lens}
    if name == "append_kv":
        return dict(k=k, v=v, **caches, **paging, new_lens=few)
    if name == "update_bounds":
        return dict(k_cache=x.k_cache, k_bounds=x.k_bounds, **paging, first_token=few)
    if name == "estimate":
        return dict(q=x.q, k_bounds=x.k_bounds, **paging, page_size=16)
    if name == "decode_step":
        k, v = (place(torch.randn(2, 1, 2, 64).half(), "contiguous", device) for _ in "kv")
        before = place(case.seq_lens - 1, "contiguous", device)
        return dict(
            q=x.q, k=k, v=v, **caches, page_table=x.page_table, start_lens=before, seq_lens=x.seq_lens, num_pages=2
        )
    if name == "topk_pages":
        scores = place(torch.randn(2, 4, 4), "contiguous", device)
        return {"scores": scores, "seq_lens": x.seq_lens, "page_size": 16, "k": 3, "num_kv_heads": 2}
    pages = place(case.random_pages(3), "contiguous", device)
    return dict(q=x.q, k_cache=x.k_cache, v_cache=x.v_cache, **paging, pages=pages)


def refusal(name: str, call: Arguments) -> str:
    """The sentence of the error, without its place in the source."""
    with pytest.raises(RuntimeError) as error:
        OPERATORS[name](**call)
    return re.sub(r"^\w+, csrc/\S+:\d+, ", "", str(error.value))


def on_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def assert_refused(name: str, good: Arguments, bad: Arguments, *parts: str, by_values: bool = False) -> None:
    """The message has these pieces, in this order, and the operator's output tensors are as before.

    Unless the refusal is by the values of a tensor, fake and meta tensors are refused in the same words.
    """
    before = {key: good[key]._base.clone() for key in WRITTEN if key in good}
    call = {**good, **bad}
    with pytest.raises(RuntimeError, match="(?s)" + ".*".join(re.escape(part) for part in parts)):
        OPERATORS[name](**call)
    for key, memory in before.items():
        assert_same_bits(good[key]._base, memory)
    if by_values:
        return
    sentence = refusal(name, call)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in call.items()}
        assert refusal(name, fake) == sentence
    if len({x.device for x in call.values() if isinstance(x, Tensor)}) == 1:
        assert refusal(name, {key: on_meta(x) for key, x in call.items()}) == sentence


TENSORS = [(name, key) for name in OPERATORS for key, x in arguments(name, "cpu").items() if isinstance(x, Tensor)]
WITH_SCALES = [(name, key) for name in SCALED for key in ("k_bounds", "k_scales")]


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_dtype(device: str, name: str, key: str) -> None:
    good = arguments(name, device)
    wrong, called = (torch.float64, "Double") if good[key].is_floating_point() else (torch.int64, "Long")
    assert_refused(name, good, {key: good[key].to(wrong)}, f"{key} must be", f"got {called}")


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_dimensions(device: str, name: str, key: str) -> None:
    good = arguments(name, device)
    bad = good[key][None, None, None]
    assert_refused(name, good, {key: bad}, f"{key} must have shape", f"got {list(bad.shape)}")


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_no_dimensions(device: str, name: str, key: str) -> None:
    good = arguments(name, device)
    assert_refused(name, good, {key: good[key].flatten()[0]}, f"{key} must have shape", "got []")


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_last_stride(device: str, name: str, key: str) -> None:
    good = arguments(name, device)
    bad = torch.stack([good[key]] * 3, -1)[..., 0]
    assert_refused(name, good, {key: bad}, f"{key} must have stride 1 in its last dimension", "got 3")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_device(name: str, key: str) -> None:
    good = arguments(name, "cuda")
    first = next(iter(good)) == key
    parts = ("must be on cpu", "got cuda:0") if first else (f"{key} must be on cuda:0", "got cpu")
    assert_refused(name, good, {key: good[key].cpu()}, *parts)


def assert_device_refused(name: str, good: Arguments, key: str) -> None:
    before = {other: good[other]._base.clone() for other in WRITTEN if other in good}
    home = good[key].device
    sentence = refusal(name, {**good, key: on_meta(good[key])})
    first = next(iter(good))
    want = f"{key} must be on {home} like ({first}|k), got meta"
    if key == first:
        want = rf"\w+ must be on meta like {key}, got {home}"
    assert re.fullmatch(want, sentence)
    for other, memory in before.items():
        assert_same_bits(good[other]._base, memory)
    alone = {other: x if other == key else on_meta(x) for other, x in good.items()}
    sentence = refusal(name, alone)
    assert f"got {'meta' if key == first else home}" in sentence


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_one_meta_tensor_among_others(device: str, name: str, key: str) -> None:
    """PyTorch runs the fake kernel for such a call, so that kernel has to refuse it."""
    assert_device_refused(name, arguments(name, device), key)


@pytest.mark.parametrize(("name", "key"), WITH_SCALES)
def test_one_meta_tensor_among_8_bit_bounds(device: str, name: str, key: str) -> None:
    assert_device_refused(name, arguments(name, device, int8=True), key)


OTHER_LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda x: x.to_sparse(), "layout torch.sparse_coo"),
    "csr": (
        lambda x: x.flatten(0, -2).to_sparse_csr() if x.dim() > 1 else x[None].to_sparse_csr(),
        "layout torch.sparse_csr",
    ),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8),
        "a quantized tensor (torch.qint8)",
    ),
    "nested": (lambda x: torch.nested.as_nested_tensor(list(x)), "a nested tensor"),
    "jagged": (lambda x: torch.nested.as_nested_tensor(list(x[None]), layout=torch.jagged), "a nested tensor"),
    "negative": (torch._neg_view, "a negative view: call resolve_neg() on it"),
    "conjugate": (lambda x: x.to(torch.complex64).conj(), "a conjugate view: call resolve_conj() on it"),
    "zero": (
        lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
        "a tensor of zeros without memory",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse|.*quantiz|.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_tensors_that_are_no_strided_memory(device: str, name: str, key: str, layout: str) -> None:
    if layout in ("csr", "quantized") and device == "cuda":
        pytest.skip("made on the CPU only")
    make, got = OTHER_LAYOUTS[layout]
    good = arguments(name, device)
    if layout == "jagged" and good[key].dim() < 2:
        pytest.skip("a jagged tensor has two dimensions")
    before = {other: good[other]._base.clone() for other in WRITTEN if other in good}
    sentence = refusal(name, {**good, key: make(good[key])})
    assert sentence == f"{key} must be a strided tensor, got {got}"
    with torch.inference_mode():
        assert refusal(name, {**good, key: make(good[key])}) == sentence
    for other, memory in before.items():
        assert_same_bits(good[other]._base, memory)


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, key in TENSORS if key not in ("pages", "new_lens", "first_token")]
)
def test_none_for_a_required_tensor(device: str, name: str, key: str) -> None:
    good = arguments(name, device)
    assert_refused(name, good, {key: None}, f"{key} must be a tensor, got None", by_values=True)


@pytest.mark.parametrize(("name", "key"), WITH_SCALES)
def test_8_bit_bounds_and_their_scales(device: str, name: str, key: str) -> None:
    good = arguments(name, device, int8=True)
    wrong = {"k_bounds": torch.float32, "k_scales": torch.float16}[key]
    must_be_scaled = "k_bounds must be int8 or uint8 where k_scales is given"
    right = {"k_bounds": must_be_scaled, "k_scales": "k_scales must be float32"}[key]
    called = {"k_bounds": "got Float", "k_scales": "got Half"}[key]
    assert_refused(name, good, {key: good[key].to(wrong)}, right, called)
    bad = good[key][None]
    assert_refused(name, good, {key: bad}, f"{key} must have shape [N, Hkv", f"got {list(bad.shape)}")
    few = good[key][:, :1]
    assert_refused(name, good, {key: few}, f"{key} must have shape" if key == "k_scales" else "must", "got")
    assert_refused(name, good, {"k_scales": None}, "k_bounds of int8 needs k_scales, got none")
    packed = good["k_bounds"].to(torch.uint8)
    assert_refused(name, good, {"k_bounds": packed}, "k_bounds must have shape [N, Hkv, 2, D / 2] with 32", "got [9, 2")
    assert_refused(name, good, {"k_bounds": packed, "k_scales": None}, "k_bounds of uint8 needs k_scales, got none")
    plain = arguments(name, device)
    assert_refused(name, plain, {"k_scales": good["k_scales"]}, must_be_scaled)


@pytest.mark.parametrize("name", SCALED)
def test_scales_of_another_pool(device: str, name: str) -> None:
    good = arguments(name, device, int8=True)
    bad = torch.zeros(10, 2, device=device)
    assert_refused(
        name, good, {"k_scales": bad}, "k_scales must have shape [N, Hkv] with 9 in dimension 0", "got [10, 2]"
    )


@pytest.mark.parametrize("factor", [-1.0, -1e-9, math.inf, math.nan, 1e39])
@pytest.mark.parametrize("name", ["append_kv", "update_bounds", "decode_step"])
def test_a_factor_of_the_standard_deviation(device: str, name: str, factor: float) -> None:
    message = "std_factor must be a finite number of at least 0, or None for minimum and maximum"
    assert_refused(name, arguments(name, device), {"std_factor": factor}, message, f"got {factor:g}")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "key"), WITH_SCALES)
def test_device_of_8_bit_bounds(name: str, key: str) -> None:
    good = arguments(name, "cuda", int8=True)
    assert_refused(name, good, {key: good[key].cpu()}, f"{key} must be on cuda:0", "got cpu")


def zeros(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(size)


def half(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(size, dtype=torch.float16)


def lens(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(size, dtype=torch.int32)


def never_touched(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.empty(size[1], dtype=torch.int32).expand(size)


def bounds(*size: int) -> tuple[str, Callable[[], Tensor], str]:
    return "k_bounds", zeros(*size), f"k_bounds must have shape [N, Hkv, 2, D] with 2|got {list(size)}"


HEAD_DIM = "must have head_dim 64, 80, 96, 128, 192 or 256|got 72"
PAGE_SIZE = "must be 4, 8, 16, 32, 64 or 128|got 12"
SIZES: list[Any] = [
    # append_kv: k [2, 3, 2, 64]
    ("append_kv", "k", zeros(2, 3, 2, 72), f"k {HEAD_DIM}"),
    ("append_kv", "v", zeros(2, 4, 2, 64), "v must have shape [B, T, Hkv, D] with 3 in dimension 1|got [2, 4, 2, 64]"),
    ("append_kv", "v", zeros(2, 3, 1, 64), "v must have shape [B, T, Hkv, D] with 2 in dimension 2|got [2, 3, 1, 64]"),
    ("append_kv", "k_cache", zeros(9, 4, 16, 64), "k_cache must have shape|with 2 in dimension 1|got [9, 4, 16, 64]"),
    ("append_kv", "k_cache", zeros(9, 2, 16, 80), "k_cache must have shape|with 64 in dimension 3|got [9, 2, 16, 80]"),
    ("append_kv", "k_cache", zeros(9, 2, 12, 64), "v_cache must have shape|with 12 in dimension 2|got [9, 2, 16, 64]"),
    ("append_kv", "v_cache", zeros(8, 2, 16, 64), "v_cache must have as many pages as k_cache, 9, got 8"),
    ("append_kv", "v_cache", zeros(9, 2, 32, 64), "v_cache must have shape|with 16 in dimension 2|got [9, 2, 32, 64]"),
    ("append_kv", "k_bounds", zeros(8, 2, 2, 64), "k_bounds must have as many pages as k_cache, 9, got 8"),
    ("append_kv", *bounds(9, 2, 3, 64)),
    ("append_kv", "page_table", lens(3, 4), "page_table must have shape [B, P] with 2 in dimension 0|got [3, 4]"),
    ("append_kv", "seq_lens", lens(3), "seq_lens must have shape [B] with 2|got [3]"),
    ("append_kv", "new_lens", lens(1), "new_lens must have shape [B] with 2|got [1]"),
    ("append_kv", "page_table", never_touched(2, 2**27), f"page_table's tokens a sequence|got {2**31}"),
    # update_bounds
    ("update_bounds", "k_cache", zeros(9, 2, 16, 72), f"k_cache {HEAD_DIM}"),
    ("update_bounds", "k_cache", zeros(9, 2, 12, 64), f"k_cache's page size (dimension 2) {PAGE_SIZE}"),
    ("update_bounds", "k_bounds", zeros(10, 2, 2, 64), "k_bounds must have as many pages as k_cache, 9, got 10"),
    ("update_bounds", *bounds(9, 1, 2, 64)),
    ("update_bounds", "seq_lens", lens(1), "seq_lens must have shape [B] with 2|got [1]"),
    ("update_bounds", "first_token", lens(3), "first_token must have shape [B] with 2|got [3]"),
    # estimate: q [2, 4, 64]
    ("estimate", "q", zeros(2, 4, 72), f"q {HEAD_DIM}"),
    ("estimate", "q", zeros(2, 3, 64), "q's heads must be a positive multiple of k_bounds' heads, got 3 and 2"),
    ("estimate", "q", zeros(2, 0, 64), "q's heads must be a positive multiple of k_bounds' heads, got 0 and 2"),
    ("estimate", "q", zeros(2, 9, 4, 64), "q must have 1 to 8 new tokens in dimension 1, got 9"),
    ("estimate", "q", zeros(2, 0, 4, 64), "q must have 1 to 8 new tokens in dimension 1, got 0"),
    ("estimate", "q", zeros(3, 4, 64), "page_table must have shape [B, P] with 3 in dimension 0|got [2, 4]"),
    (
        "estimate",
        "k_bounds",
        zeros(9, 0, 2, 64),
        "q's heads must be a positive multiple of k_bounds' heads, got 4 and 0",
    ),
    ("estimate", "k_bounds", zeros(9, 2, 2, 80), "k_bounds must have shape|with 64 in dimension 3|got [9, 2, 2, 80]"),
    ("estimate", "seq_lens", lens(3), "seq_lens must have shape [B] with 2|got [3]"),
    ("estimate", "page_size", 12, f"page_size {PAGE_SIZE}"),
    ("estimate", "page_size", 0, "page_size must be 4, 8, 16, 32, 64 or 128, got 0"),
    # topk_pages: scores [2, 4, 4]
    ("topk_pages", "scores", zeros(2, 9, 4, 4), "scores must have 1 to 8 new tokens in dimension 1, got 9"),
    ("topk_pages", "seq_lens", lens(3), "seq_lens must have shape [B] with 2|got [3]"),
    ("topk_pages", "page_size", 256, "page_size must be 4, 8, 16, 32, 64 or 128, got 256"),
    ("topk_pages", "k", 0, "k must be at least 1, got 0"),
    ("topk_pages", "k", -1, "k must|got -1"),
    ("topk_pages", "k", 2**31, f"k must fit in 32 bits, got {2**31}"),
    ("topk_pages", "num_kv_heads", 3, "scores' heads must be a positive multiple of num_kv_heads, got 4 and 3"),
    ("topk_pages", "num_kv_heads", 0, "num_kv_heads, got 4 and 0"),
    ("topk_pages", "sink_pages", -1, "sink_pages must be at least 0, got -1"),
    ("topk_pages", "recent_pages", -1, "recent_pages must be at least 0, got -1"),
    ("topk_pages", "sink_pages", 3, "sink_pages + recent_pages is 3 + 1, got k = 3"),
    ("topk_pages", "recent_pages", 2**62, f"sink_pages + recent_pages is 0 + {2**62}, got k = 3"),
    # sparse_decode: q [2, 4, 64], pages [2, 2, 3]
    ("sparse_decode", "q", zeros(2, 4, 72), f"q {HEAD_DIM}"),
    ("sparse_decode", "q", zeros(2, 5, 64), "q's heads must be a positive multiple of k_cache's heads, got 5 and 2"),
    ("sparse_decode", "q", zeros(2, 9, 4, 64), "q must have 1 to 8 new tokens in dimension 1, got 9"),
    ("sparse_decode", "q", zeros(2, 1, 4, 64), "pages must have shape [B, T, Hs, K]|got [2, 2, 3]"),
    (
        "sparse_decode",
        "k_cache",
        zeros(9, 2, 16, 80),
        "k_cache must have shape|with 64 in dimension 3|got [9, 2, 16, 80]",
    ),
    ("sparse_decode", "v_cache", zeros(8, 2, 16, 64), "v_cache must have as many pages as k_cache, 9, got 8"),
    (
        "sparse_decode",
        "v_cache",
        zeros(9, 2, 8, 64),
        "v_cache must have shape|with 16 in dimension 2|got [9, 2, 8, 64]",
    ),
    ("sparse_decode", "page_table", lens(1, 4), "page_table must have shape [B, P] with 2 in dimension 0|got [1, 4]"),
    ("sparse_decode", "seq_lens", lens(1), "seq_lens must have shape [B] with 2|got [1]"),
    ("sparse_decode", "pages", lens(2, 3, 3), "pages must have shape [B, Hs, K]|Hs 2|or 4|got [2, 3, 3]"),
    ("sparse_decode", "pages", lens(1, 2, 3), "pages must have shape [B, Hs, K]|got [1, 2, 3]"),
    # decode_step: q [2, 4, 64], k [2, 1, 2, 64]
    ("decode_step", "q", half(2, 4, 72), f"q {HEAD_DIM}"),
    ("decode_step", "q", half(2, 5, 64), "q's heads must be a positive multiple of k_cache's heads, got 5 and 2"),
    ("decode_step", "q", half(2, 9, 4, 64), "q must have 1 to 8 new tokens in dimension 1, got 9"),
    ("decode_step", "q", half(2, 2, 4, 64), "k must have shape [B, T, Hkv, D] with 2 in dimension 1|got [2, 1, 2, 64]"),
    ("decode_step", "k", half(3, 1, 2, 64), "k must have shape [B, T, Hkv, D] with 2 in dimension 0|got [3, 1, 2, 64]"),
    ("decode_step", "k", half(2, 2, 2, 64), "k must have shape [B, T, Hkv, D] with 1 in dimension 1|got [2, 2, 2, 64]"),
    ("decode_step", "v", half(2, 1, 4, 64), "v must have shape [B, T, Hkv, D] with 2 in dimension 2|got [2, 1, 4, 64]"),
    ("decode_step", "k_cache", half(9, 2, 16, 80), "k_cache must have shape|with 64 in dimension 3|got [9, 2, 16, 80]"),
    ("decode_step", "v_cache", half(8, 2, 16, 64), "v_cache must have as many pages as k_cache, 9, got 8"),
    ("decode_step", "v_cache", half(9, 2, 32, 64), "v_cache must have shape|with 16 in dimension 2|got [9, 2, 32, 64]"),
    ("decode_step", "k_bounds", half(8, 2, 2, 64), "k_bounds must have as many pages as k_cache, 9, got 8"),
    ("decode_step", "k_bounds", half(9, 2, 3, 64), "k_bounds must have shape|with 2 in dimension 2|got [9, 2, 3, 64]"),
    ("decode_step", "page_table", lens(3, 4), "page_table must have shape [B, P] with 2 in dimension 0|got [3, 4]"),
    ("decode_step", "start_lens", lens(3), "start_lens must have shape [B] with 2|got [3]"),
    ("decode_step", "seq_lens", lens(3), "seq_lens must have shape [B] with 2|got [3]"),
    ("decode_step", "num_pages", 0, "num_pages must be at least 1, got 0"),
    ("decode_step", "num_pages", -1, "num_pages must|got -1"),
    ("decode_step", "num_pages", 2**31, f"num_pages must fit in 32 bits, got {2**31}"),
    ("decode_step", "sink_pages", -1, "sink_pages must be at least 0, got -1"),
    ("decode_step", "recent_pages", -1, "recent_pages must be at least 0, got -1"),
    ("decode_step", "sink_pages", 2, "sink_pages + recent_pages is 2 + 1, got num_pages = 2"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), SIZES)
def test_sizes(device: str, name: str, key: str, value: Any, message: str) -> None:
    good = arguments(name, device)
    bad = value().to(device) if callable(value) else value
    assert_refused(name, good, {key: bad}, *message.split("|"))


MOST_TOKENS = 2**31 - 1  # of a sequence, and of a list of pages


def without_sequences(name: str, device: str, page_size: int, N: int = 9) -> Arguments:
    """Arguments with B = 0, and N pages that share memory: large sizes cost nothing."""
    good = arguments(name, device)
    for key, value in good.items():
        if key in WRITTEN:
            size = (N, 2, page_size if key.endswith("cache") else 2, 64)
            good[key] = torch.zeros(1, *size[1:], dtype=value.dtype, device=device).expand(size)
        elif isinstance(value, Tensor):
            good[key] = value[:0]
    if "page_size" in good:
        good["page_size"] = page_size
    if name == "topk_pages":  # one head, as torch refuses strides past 2^63
        good["scores"], good["num_kv_heads"] = good["scores"][:, :1], 1
    return good


def columns(tensor: Tensor, count: int) -> Tensor:
    """An empty tensor like this one, with another last dimension."""
    return tensor.new_empty((*tensor.shape[:-1], count))


@pytest.mark.parametrize("page_size", [8, 16, 128])
@pytest.mark.parametrize("name", OPERATORS)
def test_most_pages_of_a_sequence(device: str, name: str, page_size: int) -> None:
    good = without_sequences(name, device, page_size)
    key = "scores" if name == "topk_pages" else "page_table"
    most = MOST_TOKENS // page_size
    result = OPERATORS[name](**{**good, key: columns(good[key], most)})
    if name == "estimate":
        assert result.shape == (0, 4, most)
    for pages in (most + 1, 2**60 // page_size, 2**64 // page_size):
        message = f"{key}'{'s' * (key == 'page_table')} tokens a sequence (P * page_size) must fit in 32 bits"
        got = f"got {min(pages * page_size, 2**63 - 1)}"
        with pytest.raises(RuntimeError, match=re.escape(message) + ".*" + got):
            OPERATORS[name](**{**good, key: columns(good[key], pages)})


@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_most_pages_of_a_list(device: str, page_size: int) -> None:
    most = MOST_TOKENS // page_size
    good = without_sequences("sparse_decode", device, page_size)
    ops.sparse_decode(**{**good, "pages": columns(good["pages"], most)})
    with pytest.raises(
        RuntimeError, match=r"pages' tokens a list \(K \* page_size\) must fit in 32 bits, got 2147483648"
    ):
        ops.sparse_decode(**{**good, "pages": columns(good["pages"], most + 1)})
    good = without_sequences("decode_step", device, page_size)
    pages = ops.decode_step(**{**good, "num_pages": most})[2]
    assert pages.shape == (0, 2, most)
    message = r"num_pages' tokens a list \(num_pages \* page_size\) must fit in 32 bits, got 2147483648"
    with pytest.raises(RuntimeError, match=message):
        ops.decode_step(**{**good, "num_pages": most + 1})


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "topk_pages"])
def test_most_pages_of_a_pool(device: str, name: str) -> None:
    OPERATORS[name](**without_sequences(name, device, 16, N=2**31 - 1))
    with pytest.raises(RuntimeError, match="the cache's number of pages must fit in 32 bits, got 2147483648"):
        OPERATORS[name](**without_sequences(name, device, 16, N=2**31))


def test_most_of_other_sizes(device: str) -> None:
    good = without_sequences("topk_pages", device, 16)
    assert ops.topk_pages(**{**good, "k": 2**31 - 1}).shape == (0, 1, 2**31 - 1)
    good = without_sequences("append_kv", device, 16)
    for tokens, message in ((2**31 - 1, None), (2**31, "T must fit in 32 bits, got 2147483648")):
        k = good["k"].new_empty(0, tokens, 2, 64)
        if message is None:
            ops.append_kv(**{**good, "k": k, "v": k})
        else:
            with pytest.raises(RuntimeError, match=message):
                ops.append_kv(**{**good, "k": k, "v": k})
    good = arguments("estimate", device)
    with pytest.raises(RuntimeError, match="the number of sequences must fit in 32 bits, got 2147483648"):
        ops.estimate(**{**good, "q": good["q"][:1].expand(2**31, 4, 64)})


def test_a_step_at_the_most_pages(device: str) -> None:
    """16,777,215 pages of 128 tokens. All are physical page 0 but the last, which the step writes to."""
    S, D, P = 128, 64, MOST_TOKENS // 128
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=random).half() for size in ((1, 2, D), (1, 1, 1, D), (1, 1, 1, D)))
    k_cache, v_cache = (torch.randn(2, 1, S, D, generator=random).half() for _ in "kv")
    k_bounds = torch.stack([k_cache.amin(2), k_cache.amax(2)], 2)
    page_table = torch.zeros(1, P, dtype=torch.int32, device=device)
    page_table[0, -1] = 1
    seq_lens = torch.tensor([P * S], dtype=torch.int32, device=device)
    x = [y.to(device) for y in (q, k, v, k_cache, v_cache, k_bounds)]
    out, lse, pages = ops.decode_step(*x, page_table, seq_lens - 1, seq_lens, 4)
    assert pages.tolist() == [[[0, 1, 2, P - 1]]]  # the first of equal scores
    k_cache[1, :, -1], v_cache[1, :, -1] = k[0, 0], v[0, 0]
    assert_same_bits(x[3].cpu(), k_cache)
    few = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)
    exact = reference.sparse_decode(q, k_cache, v_cache, few, torch.tensor([4 * S]))
    torch.testing.assert_close(out.cpu().double(), exact[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(lse.cpu().double(), exact[1], rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_more_blocks_than_a_grid_holds() -> None:
    """B * P * Hkv = 2^32 blocks, over one row of the page table."""
    B, P, Hkv = 2**16, 2**12, 16
    k_cache, k_bounds = torch.zeros(1, Hkv, 16, 64, device="cuda"), torch.zeros(1, Hkv, 2, 64, device="cuda")
    page_table = torch.zeros(1, P, dtype=torch.int32, device="cuda").expand(B, P)
    seq_lens = torch.zeros(B, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=f"update_bounds needs {2**32} blocks, more than a CUDA grid holds"):
        ops.update_bounds(k_cache, k_bounds, page_table, seq_lens)


def test_group_reduce_has_four_names() -> None:
    with pytest.raises(ValueError, match="group_reduce must be one of none, max, sum, soft, got 'mean'"):
        ops.topk_pages(**arguments("topk_pages", "cpu"), group_reduce="mean")  # type: ignore[arg-type]
    scores, seq_lens = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"group_reduce must be 0 .*, got 4"):
        ops._ops.topk_pages(scores, seq_lens, 16, 1, 1, 4)
    step = arguments("decode_step", "cpu")
    with pytest.raises(ValueError, match="group_reduce must be one of none, max, sum, soft, got 'mean'"):
        ops.decode_step(**step, group_reduce="mean")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"group_reduce must be 0 .*, got 4"):
        ops._ops.decode_step(*step.values(), 4)


VALUES: list[Any] = [
    *(
        (name, "seq_lens", (1,), value, f"seq_lens must be 0 to 64|got {value} for sequence 1")
        for name in OPERATORS
        for value in (-1, 65, 2**31 - 1)
    ),
    *(
        (
            name,
            "page_table",
            (0, 2),
            value,
            f"page_table must hold physical pages 0 to 8, got {value} for sequence 0, page 2",
        )
        for name in ("append_kv", "update_bounds", "estimate", "sparse_decode", "decode_step")
        for value in (-1, 9, 2**31 - 1)
    ),
    *(
        ("decode_step", "start_lens", (1,), value, f"start_lens must be 0 to 64|got {value} for sequence 1")
        for value in (-1, 65, 2**31 - 1)
    ),
    (
        "decode_step",
        "page_table",
        (1, 0),
        9,
        "page_table must hold physical pages 0 to 8, got 9 for sequence 1, page 0",
    ),
    ("decode_step", "seq_lens", (1,), 21, "seq_lens must be start_lens + T, 19 + 1 for sequence 1, got 21"),
    ("decode_step", "start_lens", (0,), 35, "seq_lens must be start_lens + T, 35 + 1 for sequence 0, got 37"),
    ("append_kv", "new_lens", (1,), -1, "new_lens must be 0 to 3|got -1 for sequence 1"),
    ("append_kv", "new_lens", (0,), 4, "new_lens must be 0 to 3|got 4 for sequence 0"),
    ("append_kv", "seq_lens", (1,), 64, "page_table must have room for seq_lens + new tokens, 64 + 1 for sequence 1"),
    ("update_bounds", "first_token", (1,), -5, "first_token must be at least 0, got -5 for sequence 1"),
    ("sparse_decode", "pages", (1, 1, 2), 4, "pages must hold logical pages 0 to 3|got 4 for sequence 1, head 1"),
    ("sparse_decode", "pages", (0, 1, 0), -2, "pages must hold logical pages 0 to 3|got -2 for sequence 0, head 1"),
]


@pytest.mark.parametrize(("name", "key", "place", "value", "message"), VALUES)
def test_values(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, key: str, place: tuple[int, ...], value: int, message: str
) -> None:
    """Values are checked on the CPU always, and on the GPU where QUEST_OPS_CHECK=1 asks for it."""
    if device == "cuda":
        monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    good = arguments(name, device)
    bad = good[key].clone()
    bad[place] = value
    assert_refused(name, good, {key: bad}, *message.split("|"), by_values=True)


def test_append_past_the_capacity_without_new_lens() -> None:
    good = arguments("append_kv", "cpu")
    bad = {"new_lens": None, "seq_lens": torch.tensor([20, 62], dtype=torch.int32)}
    parts = ("page_table must have room", "62 + 3 for sequence 1", "got 4 pages of 16")
    assert_refused("append_kv", good, bad, *parts, by_values=True)


@pytest.mark.gpu
class TestUncheckedOnTheGPU:
    """Without QUEST_OPS_CHECK values are unchecked. No kernel leaves its tensors for any of them."""

    @pytest.fixture(autouse=True)
    def unchecked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QUEST_OPS_CHECK", raising=False)

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize(
        ("name", "int8"), [*((name, False) for name in OPERATORS), *((name, True) for name in SCALED)]
    )
    def test_garbage(self, name: str, int8: bool, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        extremes = torch.tensor(
            [-(2**31), -(2**31) + 1, -17, -2, -1, 0, 3, 9, 17, 64, 65, 2**20, 2**31 - 16, 2**31 - 1]
        )
        good = arguments(name, "cuda", int8)
        memory = {key: x._base for key, x in good.items() if isinstance(x, Tensor)}
        for x in good.values():
            if isinstance(x, Tensor) and x.dtype == torch.int32:
                x.copy_(extremes[torch.randint(len(extremes), x.shape, generator=random)])
        before = {key: x.clone() for key, x in memory.items()}
        OPERATORS[name](**good)
        torch.cuda.synchronize()
        for key, x in memory.items():
            if key in WRITTEN and name in ("append_kv", "update_bounds", "decode_step"):
                for base in (x, before[key]):  # any write within the tensor is allowed
                    base.as_strided(good[key].shape, good[key].stride(), good[key].storage_offset()).zero_()
            assert_same_bits(x, before[key])

    @pytest.mark.parametrize("page", [-1, 9, 2**31 - 1, -(2**31)])
    def test_a_page_that_does_not_exist_is_nan(self, page: int) -> None:
        good = arguments("estimate", "cuda")
        good["page_table"][0, 1] = page
        scores = ops.estimate(**good).cpu()
        assert scores[0, :, 1].isnan().all()
        assert scores[0, :, [0, 2]].isfinite().all()
        assert scores[1, :, :2].isfinite().all()
        good = arguments("sparse_decode", "cuda")
        good["page_table"][0, 1] = page
        lists = torch.tensor([[0, 1, 2], [0, 2, -1]], dtype=torch.int32, device="cuda")
        for pages, broken in ((None, [0, 1, 2, 3]), (lists.expand(2, 2, 3).contiguous(), [0, 1])):
            out, lse = (x.cpu() for x in ops.sparse_decode(**{**good, "pages": pages}))
            whole = [h for h in range(4) if h not in broken]
            assert out[0, broken].isnan().all()
            assert lse[0, broken].isnan().all()
            assert out[0, whole].isfinite().all()
            assert lse[0, whole].isfinite().all()
            assert out[1].isfinite().all()
            assert lse[1].isfinite().all()
