"""Finds and loads the compiled libraries, and gives their operators what PyTorch asks of them in Python.

Two plain libraries, both built on LibTorch's stable ABI: ``_C`` with the schemas and the CPU kernels, ``_C_cuda`` with
the CUDA kernels, loaded only where torch itself is built for CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

MINIMUM_TORCH = (2, 10)
OPERATORS = ("append_kv", "update_bounds", "estimate", "topk_pages", "sparse_decode", "decode_step")
_REBUILD = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .` in the project's folder"


def _check_torch_version() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"quest_ops needs torch {needed} or newer, found {torch.__version__}: run `pip install 'torch>={needed}'`."
        )


def _find(stem: str) -> Path | None:
    # importlib.resources also follows editable installs, where the libraries are not beside this file.
    entry = importlib.resources.files(__package__) / f"{stem}.so"
    return Path(str(entry)) if entry.is_file() else None


def _check_namespace(path: Path) -> str:
    """The namespace that the library at `path` registers, if it is free."""
    found = re.search(rb"quest_ops_namespace=(\w+)", path.read_bytes())
    if found is None:
        raise _not_ours(path)
    namespace = found[1].decode()
    registered = getattr(torch.ops, namespace)
    loaded = str(path.resolve()) in torch.ops.loaded_libraries
    if not loaded and any(hasattr(registered, name) for name in OPERATORS):
        raise ImportError(
            f"quest_ops cannot register its operators: another library, or a second copy of this one, has taken "
            f"torch.ops.{namespace}. Load only one, or build with `-C cmake.define.QUEST_NAMESPACE=<another name>`."
        )
    return namespace


def _not_ours(path: Path) -> ImportError:
    return ImportError(f"quest_ops found in {path} something other than its library: {_REBUILD}.")


def _load(path: Path, symbol: str) -> dict[str, Any]:
    """Loads a library and returns what it says of its build.

    What can be told from the file is: torch ends the process as a library loads that registers an operator twice.
    """
    if symbol.encode() not in path.read_bytes():
        raise _not_ours(path)
    try:
        torch.ops.load_library(path)
        function = getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, AttributeError) as error:
        cause = error.__cause__ or error
        raise ImportError(
            f"quest_ops could not load {path.name} with torch {torch.__version__} ({cause}); it was built for another "
            f"torch, CUDA or processor, or is damaged: {_REBUILD}."
        ) from error
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function().decode())
    return info


_check_torch_version()
_cpu_path = _find("_C")
if _cpu_path is None:
    raise ImportError(
        "quest_ops found no compiled library _C beside its Python files: build it with "
        "`pip install --no-build-isolation .` in the project's folder."
    )

#: The operator namespace, ``quest`` unless the build set its own QUEST_NAMESPACE.
NAMESPACE: str = _check_namespace(_cpu_path)
#: What the CPU library says of its build: namespace, version, torch target, compiler, instruction set in use.
build_info: dict[str, Any] = _load(_cpu_path, "quest_ops_build_info")
ops = getattr(torch.ops, NAMESPACE)

for _name in OPERATORS:
    if not hasattr(ops, _name):
        raise ImportError(f"quest_ops found a library _C older than its Python files, without {_name}: {_REBUILD}.")

#: Why the CUDA kernels are not there, or None where they are.
cuda_missing: str | None = None
#: What the CUDA library says of its build, or None.
cuda_build_info: dict[str, Any] | None = None

_cuda_path = _find("_C_cuda")
if torch.version.cuda is None:
    cuda_missing = f"torch {torch.__version__} is not built for CUDA"
elif _cuda_path is None:
    cuda_missing = (
        "this build of quest_ops has no CUDA library: install nvcc and rebuild with "
        "`pip install --no-build-isolation -C cmake.define.QUEST_CUDA=ON .` in the project's folder"
    )
else:
    cuda_build_info = _load(_cuda_path, "quest_ops_cuda_build_info")
    for _key in ("namespace", "version", "schemas"):
        if cuda_build_info[_key] != build_info[_key]:
            raise ImportError(
                f"quest_ops found libraries of different builds, _C with {_key} {build_info[_key]} and _C_cuda with "
                f"{_key} {cuda_build_info[_key]}: {_REBUILD}."
            )


def _refuse_cuda(name: str) -> Any:
    def kernel(*args: Any) -> NoReturn:
        raise RuntimeError(f"{NAMESPACE}::{name} cannot run on CUDA tensors: {cuda_missing}.")

    return kernel


if cuda_missing and torch.version.cuda:
    _refusals = torch.library.Library(NAMESPACE, "IMPL")
    for _name in OPERATORS:
        _refusals.impl(_name, _refuse_cuda(_name), "CUDA")


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"{NAMESPACE}::{name}")


@_fake("append_kv")
def _append_kv(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens=None, k_scales=None):  # type: ignore[no-untyped-def]
    return None


@_fake("update_bounds")
def _update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token=None, k_scales=None):  # type: ignore[no-untyped-def]
    return None


@_fake("estimate")
def _estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales=None):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:-1], page_table.shape[1]), dtype=torch.float32)


@_fake("topk_pages")
def _topk_pages(  # type: ignore[no-untyped-def]
    scores,
    seq_lens,
    page_size,
    k,
    num_kv_heads,
    group_reduce=1,
    sink_pages=0,
    recent_pages=1,
    scale=1.0,
):
    heads = scores.shape[-2] if group_reduce == 0 else num_kv_heads
    return scores.new_empty((*scores.shape[:-2], heads, k), dtype=torch.int32)


@_fake("sparse_decode")
def _sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages=None, scale=None):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("decode_step")
def _decode_step(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    k_cache,
    v_cache,
    k_bounds,
    page_table,
    start_lens,
    seq_lens,
    num_pages,
    group_reduce=1,
    sink_pages=0,
    recent_pages=1,
    scale=None,
    k_scales=None,
):
    heads = q.shape[-2] if group_reduce == 0 else k_cache.shape[1]
    pages = q.new_empty((*q.shape[:-2], heads, num_pages), dtype=torch.int32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32), pages


class _WithoutBackward(torch.autograd.Function):
    """The first ``count`` tensors, as results of the others whose backward raises."""

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
    """``out``, with a backward that raises where ``inputs`` want a gradient that ``out`` would not give them."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        (out,) = _WithoutBackward.apply(name, 1, out, *inputs)  # type: ignore[no-untyped-call]
    return out


def _autograd_kernel(name: str) -> Any:
    """Runs the operator below autograd. ``torch.library.register_autograd`` would drop forward-mode tangents unsaid."""
    op, qualified = getattr(ops, name).default, f"{NAMESPACE}::{name}"

    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise _no_gradient(qualified, "forward-mode derivative")
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if differentiated and torch._C._are_functorch_transforms_active():
            raise _no_gradient(qualified, "backward")  # torch.func would make an internal error of a later one
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if not differentiated:
            return result
        results = result if isinstance(result, tuple) else (result,)
        refused = _WithoutBackward.apply(qualified, len(results), *results, *tensors)  # type: ignore[no-untyped-call]
        return refused if isinstance(result, tuple) else refused[0]

    return kernel


_autograd = torch.library.Library(NAMESPACE, "IMPL")
for _name in ("estimate", "sparse_decode", "decode_step"):
    _autograd.impl(_name, _autograd_kernel(_name), "Autograd", with_keyset=True)
