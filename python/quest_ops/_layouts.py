"""The refusal of tensors that are no plain strided memory: sparse, quantized, nested, and lazily negated or conjugated.

They arrive at dispatch keys of their own, where PyTorch would report a backend and no argument. Other tensors never
come here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from ._library import NAMESPACE, OPERATORS, ops

_KEYS = (
    *(
        f"{layout}{device}"
        for layout in ("Sparse", "SparseCsr", "Quantized", "NestedTensor")
        for device in ("CPU", "CUDA")
    ),
    "AutogradNestedTensor",  # PyTorch has no fallback here
    "MkldnnCPU",
    "Negative",
    "Conjugate",
    "ZeroTensor",
)


def _description(x: Tensor) -> str | None:
    """Why a tensor is not plain memory; None for one that is."""
    if x.is_nested:
        return "a nested tensor"
    if x.layout != torch.strided:
        return f"layout {x.layout}"
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype})"
    if x.is_conj():
        return "a conjugate view: call resolve_conj() on it"
    if x.is_neg():
        return "a negative view: call resolve_neg() on it"
    return "a tensor of zeros without memory" if x._is_zerotensor() else None


def _refusal(name: str) -> Any:
    names = [x.name for x in getattr(ops, name).default._schema.arguments]

    def error(*args: Any, **kwargs: Any) -> RuntimeError:
        for argument, x in (*zip(names, args, strict=False), *kwargs.items()):
            if isinstance(x, Tensor) and (description := _description(x)):
                return RuntimeError(f"{argument} must be a strided tensor, got {description}")
        return RuntimeError(f"{NAMESPACE}::{name} takes strided tensors only")

    return error


def _kernel(name: str) -> Any:
    error = _refusal(name)

    def kernel(*args: Any) -> NoReturn:
        raise error(*args)

    return kernel


def _jagged_refusal(name: str) -> Any:
    error = _refusal(name)

    def rule(_subclass: Any, _op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise error(*args, **(kwargs or {}))

    return rule


_layouts = torch.library.Library(NAMESPACE, "IMPL")
for _name in OPERATORS:
    for _key in _KEYS:
        _layouts.impl(_name, _kernel(_name), _key)
    torch.library.register_torch_dispatch(f"{NAMESPACE}::{_name}", NestedTensor, _jagged_refusal(_name))
