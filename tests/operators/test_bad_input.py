"""Devices, layouts and limits of arguments. Other bad input is in test_bad_input_table.py.

Wrong values that a GPU does not check never lead a kernel outside its tensors.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.bad_inputs import OPERATORS, SCALED, TENSORS, WRITTEN, Arguments, arguments
from helpers.operator_cases import assert_same_bits
from quest_ops import ops, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def refusal(name: str, call: Arguments) -> str:
    """The sentence of the error, without its place in the source."""
    with pytest.raises(RuntimeError) as error:
        OPERATORS[name](**call)
    return re.sub(r"^\w+, csrc/\S+:\d+, ", "", str(error.value))


def on_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def assert_refused(name: str, good: Arguments, bad: Arguments, *parts: str) -> None:
    """The message has these pieces, in this order, and the operator's output tensors are as before.

    Fake tensors are refused in the same words.
    """
    before = {key: good[key]._base.clone() for key in WRITTEN if key in good}
    call = {**good, **bad}
    with pytest.raises(RuntimeError, match="(?s)" + ".*".join(re.escape(part) for part in parts)):
        OPERATORS[name](**call)
    for key, memory in before.items():
        assert_same_bits(good[key]._base, memory)
    sentence = refusal(name, call)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in call.items()}
        assert refusal(name, fake) == sentence


WITH_SCALES = [(name, key) for name in SCALED for key in ("k_bounds", "k_scales")]


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


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "key"), WITH_SCALES)
def test_device_of_8_bit_bounds(name: str, key: str) -> None:
    good = arguments(name, "cuda", int8=True)
    assert_refused(name, good, {key: good[key].cpu()}, f"{key} must be on cuda:0", "got cpu")


MOST_TOKENS = 2**31 - 1  # of a sequence, and of a list of pages


def without_sequences(name: str, device: str, page_size: int, N: int = 9) -> Arguments:
    """Arguments with B = 0, and N pages that share memory: large sizes cost nothing."""
    good = arguments(name, device)
    for key, value in good.items():
        if key in WRITTEN:
            size = [N, *value.shape[1:]]
            if key != "k_bounds":
                size[2] = page_size
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
    for pages in (most + 1, 2**60 // page_size, (2**63 - 1) // page_size, 2**64 // page_size):
        message = f"{key}'{'s' * (key == 'page_table')} tokens a sequence (P * page_size) must fit in 32 bits"
        got = f"got {min(pages * page_size, 2**63 - 1)}"
        with pytest.raises(RuntimeError, match=re.escape(message) + ".*" + got):
            OPERATORS[name](**{**good, key: columns(good[key], pages)})


@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_most_pages_of_a_list(device: str, page_size: int) -> None:
    most = MOST_TOKENS // page_size
    for name in ("rerank_pages", "sparse_decode"):
        good = without_sequences(name, device, page_size)
        OPERATORS[name](**{**good, "pages": columns(good["pages"], most)})
        with pytest.raises(
            RuntimeError, match=r"pages' tokens a list \(K \* page_size\) must fit in 32 bits, got 2147483648"
        ):
            OPERATORS[name](**{**good, "pages": columns(good["pages"], most + 1)})
    good = without_sequences("decode_step", device, page_size)
    pages = ops.decode_step(**{**good, "num_pages": most})[2]
    assert pages.shape == (0, 2, most)
    message = r"num_pages' tokens a list \(num_pages \* page_size\) must fit in 32 bits, got 2147483648"
    with pytest.raises(RuntimeError, match=message):
        ops.decode_step(**{**good, "num_pages": most + 1})
    for name, call in (("topk_pages", ops.topk_pages), ("decode_step", lambda **given: ops.decode_step(**given)[2])):
        good = without_sequences(name, device, page_size)
        for tokens in (most * page_size, (most - 1) * page_size + 1):
            assert call(**good, dense_below=tokens).shape == (0, 1 if name == "topk_pages" else 2, most)
        with pytest.raises(RuntimeError, match="dense_below in whole pages must fit in 32 bits, got 2147483648"):
            call(**good, dense_below=most * page_size + 1)


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
    good = without_sequences("decode_step", device, 16)
    good |= {"kept_pages": good["seq_lens"].new_empty(0, 2, 2**31 - 1), "kept_steps": good["seq_lens"]}
    ops.decode_step(**good)
    with pytest.raises(RuntimeError, match="kept_pages' places must fit in 32 bits, got 2147483648"):
        ops.decode_step(**{**good, "kept_pages": columns(good["kept_pages"], 2**31)})
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


def test_lengths_of_a_step_whose_sum_passes_32_bits() -> None:
    """The refusal adds nothing up: `make sanitize` would show an overflow. No memory of the page table is touched."""
    good, P = arguments("decode_step", "cpu"), MOST_TOKENS // 4
    lens = torch.zeros(1, dtype=torch.int32)
    good |= {key: good[key][:, :, :4] for key in ("k_cache", "v_cache")}
    good |= {key: good[key][:1].expand(1, 8, 2, 64) for key in "kv"}
    good |= {"q": good["q"][:1, None].expand(1, 8, 4, 64), "page_table": torch.empty(1, P, dtype=torch.int32)}
    good |= {"start_lens": lens + 4 * P, "seq_lens": lens}
    sentence = refusal("decode_step", good)
    assert sentence == "seq_lens must be start_lens + T, 2147483644 + 8 for sequence 0, got 0"


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
            if key in WRITTEN and name in ("append_kv", "update_bounds", "append_codes", "decode_step"):
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
