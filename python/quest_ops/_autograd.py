"""The refusal of derivatives: backward and forward-mode AD raise, since the operators are for decoding.

Without it PyTorch would drop gradients silently. csrc/mark_written.h has the refusal for written tensors.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from ._check_arguments import check_written
from ._library import NAMESPACE, ops


class _WithoutBackward(torch.autograd.Function):
    """Returns the first ``count`` tensors, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise _no_gradient(ctx.name, "backward")


def _no_gradient(name: str, kind: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no {kind}: quest_ops is for decoding. Call it under torch.no_grad() or torch.inference_mode(), or "
        f"train with dense attention."
    )


def refuse_backward(name: str, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Returns ``out``, with a backward that raises if any of ``inputs`` requires a gradient.

    Args:
        name: of the computation, for the error.
        out: its result.
        inputs: tensors to which no gradient would flow from ``out``.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        (out,) = _WithoutBackward.apply(name, 1, out, *inputs)  # type: ignore[no-untyped-call]
    return out


def _autograd_kernel(name: str) -> Any:
    """The operator's Autograd kernel: the operator itself, with derivatives refused.

    ``torch.library.register_autograd`` is no alternative: it drops forward-mode tangents silently.
    """
    op, qualified = getattr(ops, name).default, f"{NAMESPACE}::{name}"
    below = torch._C._after_autograd_keyset
    arguments = op._schema.arguments
    written = [(i, x.name) for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        # The path of decoding: nothing more than the call itself.
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return op.redispatch(keyset & below, *args)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise _no_gradient(qualified, "forward-mode derivative")
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if differentiated and torch._C._are_functorch_transforms_active():
            raise _no_gradient(qualified, "backward")  # raised in backward, torch.func reports an internal error
        if differentiated:
            check_written({argument: args[i] for i, argument in written if i < len(args)})
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & below, *args)
        if not differentiated:
            return result
        results = result if isinstance(result, tuple) else (result,)
        refused = _WithoutBackward.apply(qualified, len(results), *results, *tensors)  # type: ignore[no-untyped-call]
        return refused if isinstance(result, tuple) else refused[0]

    return kernel


_autograd = torch.library.Library(NAMESPACE, "IMPL")
for _name in ("estimate", "rerank_pages", "sparse_decode", "decode_step"):
    _autograd.impl(_name, _autograd_kernel(_name), "Autograd", with_keyset=True)
