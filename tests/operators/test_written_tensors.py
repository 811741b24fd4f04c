"""Operators that write raise versions, and refuse tensors that require gradients, as torch's in-place operators do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from helpers.operator_cases import KINDS, Case, Shape, assert_same_bits
from quest_ops import ops
from torch import Tensor

WRITES = {
    "append_kv": ("k_cache", "v_cache", "k_bounds", "k_scales"),
    "update_bounds": ("k_bounds", "k_scales"),
    "decode_step": ("k_cache", "v_cache", "k_bounds", "k_scales", "counters", "kept_pages"),
}
#: Those that every call has, and whose contents do not depend on the calls before.
STORED = {
    name: tuple(key for key in keys if key not in ("k_scales", "counters", "kept_pages"))
    for name, keys in WRITES.items()
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
EACH = pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in STORED.items() for key in keys])


def arguments(name: str, device: str, int8: bool = False, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    x = Case(Shape(dtype, lengths=(37, 20), kind=KINDS["minmax-8-bit" if int8 else "minmax"])).on(device)
    k, v = (torch.randn(2, 1, 2, 64, device=device, dtype=dtype) for _ in "kv")
    scales = {"k_scales": x.k_scales} if int8 else {}
    caches = {"k_cache": x.k_cache, "v_cache": x.v_cache, "k_bounds": x.k_bounds, **scales}
    if name == "append_kv":
        return dict(k=k, v=v, **caches, page_table=x.page_table, seq_lens=x.seq_lens - 1)
    if name == "update_bounds":
        del caches["v_cache"]
        return dict(**caches, page_table=x.page_table, seq_lens=x.seq_lens)
    lens = {"start_lens": x.seq_lens - 1, "seq_lens": x.seq_lens}
    kept = {"kept_pages": torch.zeros(2, 2, 2, dtype=torch.int32, device=device), "kept_steps": x.seq_lens * 0}
    counters = ops.new_counters(2, 2, device)
    return dict(q=x.q, k=k, v=v, **caches, page_table=x.page_table, **lens, num_pages=2, counters=counters, **kept)


def call(name: str, given: dict[str, Any]) -> Any:
    return getattr(ops, name)(**given)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("int8", [False, True], ids=["cache", "int8"])
@pytest.mark.parametrize("name", WRITES)
def test_versions_of_written_tensors_rise(device: str, name: str, int8: bool, mode: str) -> None:
    given = arguments(name, device, int8)
    before = {key: x._version for key, x in given.items() if isinstance(x, Tensor)}
    with MODES[mode]():
        call(name, given)
    for key, version in before.items():
        assert (given[key]._version > version) == (key in WRITES[name]), key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("int8", [False, True], ids=["cache", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_versions_rise_in_a_step_over_every_page(device: str, dtype: torch.dtype, int8: bool, mode: str) -> None:
    given = {**arguments("decode_step", device, int8, dtype), "num_pages": 0, "kept_pages": None, "kept_steps": None}
    before = {key: x._version for key, x in given.items() if isinstance(x, Tensor)}
    with MODES[mode]():
        call("decode_step", given)
    for key, version in before.items():
        assert (given[key]._version > version) == (key in WRITES["decode_step"]), key


@pytest.mark.parametrize("mode", MODES)
@EACH
def test_a_gradient_through_a_saved_tensor_raises(device: str, name: str, key: str, mode: str) -> None:
    given = arguments(name, device)
    factor = torch.ones_like(given[key], requires_grad=True)
    loss = (factor * given[key]).sum()  # autograd saves the tensor
    with MODES[mode]():
        call(name, given)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["leaf", "view of a leaf", "result"])
@EACH
def test_a_tensor_that_requires_a_gradient_is_refused(device: str, name: str, key: str, kind: str) -> None:
    given = arguments(name, device)
    leaf = (torch.stack([given[key]] * 2) if kind != "leaf" else given[key].clone()).requires_grad_()
    given[key] = {"leaf": lambda: leaf, "view of a leaf": lambda: leaf[1], "result": lambda: leaf[1] * 1}[kind]()
    before = {other: x.detach().clone() for other, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(RuntimeError, match=f"{key} must not require a gradient, since it is written to"):
        call(name, given)
    for other, x in before.items():
        assert_same_bits(given[other].detach(), x)
    for mode in ("no_grad", "inference"):
        with MODES[mode]():
            call(name, given)
    if kind == "leaf":
        assert leaf.grad_fn is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRITES)
def test_a_lazy_clone_gets_memory_of_its_own(device: str, name: str, mode: str) -> None:
    """The tensor that it was cloned from, and other clones, stay as they are."""
    given = arguments(name, device, int8=True)
    written = WRITES[name]
    originals = {key: given[key].contiguous() for key in written}
    before = {key: x.clone() for key, x in originals.items()}
    call(name, {**given, **(expected := {key: x.clone() for key, x in before.items()})})
    clones, others = ({key: torch._lazy_clone(x) for key, x in originals.items()} for _ in range(2))
    with MODES[mode]():
        call(name, {**given, **clones})
    for key in written:
        assert_same_bits(originals[key], before[key])
        assert_same_bits(others[key], before[key])
        assert_same_bits(clones[key], expected[key])


@pytest.mark.parametrize("name", WRITES)
def test_lazy_clones_are_read_as_they_are(device: str, name: str) -> None:
    given = arguments(name, device)
    expected = {key: x.clone() if isinstance(x, Tensor) else x for key, x in given.items()}
    lazy = {key: torch._lazy_clone(x) for key, x in given.items() if isinstance(x, Tensor) and key not in WRITES[name]}
    call(name, {**given, **lazy})
    call(name, expected)
    for key in STORED[name]:
        assert_same_bits(given[key], expected[key])


@pytest.mark.parametrize("name", WRITES)
def test_inference_tensors_may_be_written_anywhere(device: str, name: str) -> None:
    """They have no version, and autograd cannot save them."""
    with torch.inference_mode():
        given = arguments(name, device, int8=True)
    expected = {key: x.clone() if isinstance(x, Tensor) else x for key, x in given.items()}
    call(name, expected)
    for mode in MODES.values():
        with mode():
            call(name, given)
    for key in (*STORED[name], "k_scales"):
        assert_same_bits(given[key], expected[key])


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", WRITES)
def test_compiled(device: str, name: str, backend: str, grad: bool) -> None:
    torch._dynamo.reset()
    given = arguments(name, device)
    for key in STORED[name]:
        given[key] = given[key].contiguous()
    compiled = torch.compile(lambda given: call(name, given), fullgraph=True, backend=backend)
    before = {key: x._version for key, x in given.items() if isinstance(x, Tensor)}
    factors = {key: torch.ones_like(given[key], requires_grad=True) for key in STORED[name]}
    losses = [(factor * given[key]).sum() for key, factor in factors.items()]
    with nullcontext() if grad else torch.no_grad():
        compiled(given)
    for key, version in before.items():
        assert (given[key]._version > version) == (key in WRITES[name]), key
    for loss in losses:
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()
    leaf = given[WRITES[name][0]].clone().requires_grad_()
    stored = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="requires? (a )?grad"):
        compiled({**given, WRITES[name][0]: leaf})
    assert_same_bits(leaf.detach(), stored)
