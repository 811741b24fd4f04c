"""Every bad input of the table raises its sentence, in eager mode, for fake tensors and under torch.compile.

Nothing is written before the error.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from helpers.bad_inputs import ACCEPTED, BAD_INPUTS, FAMILIES, OPERATORS, TABLE, WRITTEN, Arguments, BadInput
from helpers.operator_cases import assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

EACH = pytest.mark.parametrize("case", BAD_INPUTS, ids=[f"{i}-{case}" for i, case in enumerate(BAD_INPUTS)])
# A family makes the same mistake in many arguments, and compiling is slow, so every third of its rows is compiled.
COMPILED = [case for case in (*TABLE, *FAMILIES[::3]) if not case.by_values]
WITHOUT_VALUES = [case for case in BAD_INPUTS if not case.by_values]
# Tensors that torch makes no fake tensor of, and those that it makes on the CPU only.
NOT_FAKE = ("nested", "quantized", "zeros without memory", "sparse")
CPU_ONLY = ("quantized",)
NOT_COMPILED = ("nested",)  # an internal error of torch

pytestmark = pytest.mark.filterwarnings("ignore:Sparse|.*quantiz|.*nested tensors:UserWarning")


def first_error(operator: str, call: Arguments) -> str:
    """The first line of the error of a call, empty where it is accepted."""
    try:
        OPERATORS[operator](**call)
    except (RuntimeError, ValueError) as error:
        return first_line(str(error))
    return ""


def first_line(text: str) -> str:
    """Without the place in the source."""
    return re.sub(r"^\w+, csrc/\S+:\d+, ", "", text).splitlines()[0]


def compiled_error(operator: str, call: Arguments) -> str:
    """The same under torch.compile, which quotes the error of the fake kernel in its own."""
    unlimited = torch._dynamo.config.patch(recompile_limit=len(BAD_INPUTS), accumulated_recompile_limit=len(BAD_INPUTS))
    with unlimited, pytest.raises((RuntimeError, ValueError)) as error:
        torch.compile(OPERATORS[operator], backend="eager", dynamic=False)(**call)
    quoted = re.search(r"got RuntimeError\((.*)\)$", str(error.value), re.MULTILINE)
    line = first_line(ast.literal_eval(quoted[1]) if quoted else str(error.value))
    return line.replace("immutable_list", "list")


def expected(case: BadInput, device: str) -> str:
    return case.message.replace("{device}", "cuda:0" if device == "cuda" else device)


def memory_of(x: Tensor) -> Tensor:
    """All of a tensor's memory, and what lies beside it."""
    return x._base if x._base is not None else x


class Unchanged:
    """Compares the tensors that operators write before and after."""

    def __init__(self, *calls: Arguments) -> None:
        written = [call[key] for call in calls for key in WRITTEN if key in call]
        self.tensors = [memory_of(x).detach() for x in written if is_plain(x)]
        self.before = [x.clone() for x in self.tensors]

    def check(self) -> None:
        for x, before in zip(self.tensors, self.before, strict=True):
            assert_same_bits(x, before)


def is_plain(x: Any) -> bool:
    """Whether a value is a tensor with memory that can be compared."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided or x.device.type == "meta":
        return False
    return not (x.is_quantized or x.is_neg() or x.is_conj() or x._is_zerotensor() or x.is_complex())


def skip_if_impossible(case: BadInput, device: str) -> None:
    if device == "cuda" and any(word in case.message for word in CPU_ONLY):
        pytest.skip("torch makes such a tensor on the CPU only")


def test_size_of_the_table() -> None:
    assert len(BAD_INPUTS) >= 120
    assert {case.operator for case in BAD_INPUTS} == set(OPERATORS)


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_accepted_at_the_limits(device: str, monkeypatch: pytest.MonkeyPatch, case: BadInput) -> None:
    if device == "cuda":
        monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    assert first_error(case.operator, case.arguments(device)[1]) == ""


@EACH
def test_eager(device: str, monkeypatch: pytest.MonkeyPatch, case: BadInput) -> None:
    """Numbers in tensors are checked on the CPU always, and on the GPU where QUEST_OPS_CHECK=1 asks for it."""
    skip_if_impossible(case, device)
    if case.by_values and device == "cuda":
        monkeypatch.setenv("QUEST_OPS_CHECK", "1")
    good, call = case.arguments(device)
    memory = Unchanged(good, call)
    assert first_error(case.operator, call) == expected(case, device)
    memory.check()


def on_meta(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


@pytest.mark.parametrize("case", WITHOUT_VALUES, ids=str)
def test_meta(case: BadInput) -> None:
    _, call = case.arguments("cpu")
    plain = all(is_plain(x) or x.is_complex() for x in call.values() if isinstance(x, Tensor))
    if not plain or any(word in case.message for word in ("meta", *NOT_FAKE, "view", "gradient")):
        pytest.skip("a meta tensor has no such property")
    if "got that of" in case.message:
        pytest.skip("a meta tensor has no memory")
    assert first_error(case.operator, {key: on_meta(x) for key, x in call.items()}) == expected(case, "cpu")


@pytest.mark.parametrize("case", WITHOUT_VALUES, ids=str)
def test_fake(device: str, case: BadInput) -> None:
    if any(word in case.message for word in NOT_FAKE):
        pytest.skip("torch makes no fake tensor of it")
    _, call = case.arguments(device)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in call.items()}
        assert first_error(case.operator, fake) == expected(case, device)


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled(device: str, case: BadInput) -> None:
    skip_if_impossible(case, device)
    if any(word in case.message for word in NOT_COMPILED):
        pytest.skip("torch.compile takes no such tensor")
    good, call = case.arguments(device)
    memory = Unchanged(good, call)
    assert compiled_error(case.operator, call) == expected(case, device)
    memory.check()
