"""Finds, checks and loads the compiled libraries.

Both are plain libraries on LibTorch's stable ABI. ``_C`` has the schemas and the CPU kernels. ``_C_cuda`` has the CUDA
kernels and is loaded only where torch itself is built for CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

MINIMUM_TORCH = (2, 10)
OPERATORS = (
    "append_kv",
    "update_bounds",
    "estimate",
    "topk_pages",
    "append_codes",
    "rerank_pages",
    "sparse_decode",
    "decode_step",
)
_REBUILD = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .` in the project's folder"


def _check_torch_version() -> None:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"quest_ops needs torch {needed} or newer, found {torch.__version__}: run `pip install 'torch>={needed}'`."
        )


def _find(stem: str) -> Path | None:
    # importlib.resources follows editable installs too; there the libraries do not lie beside this file.
    entry = importlib.resources.files(__package__) / f"{stem}.so"
    return Path(str(entry)) if entry.is_file() else None


def _check_namespace(path: Path) -> str:
    """The namespace that the library at ``path`` registers.

    Raises:
        ImportError: the file is not this library, or the namespace is taken.
    """
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
    """Loads a library and returns its build information."""
    # Read from the file first: torch ends the process when a loading library registers an operator twice.
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
#: The CPU library's build: namespace, version, torch target, compiler, instruction set in use.
build_info: dict[str, Any] = _load(_cpu_path, "quest_ops_build_info")
ops = getattr(torch.ops, NAMESPACE)

for _name in OPERATORS:
    if not hasattr(ops, _name):
        raise ImportError(f"quest_ops found a library _C older than its Python files, without {_name}: {_REBUILD}.")

#: Why the CUDA kernels are missing; None where they are loaded.
cuda_missing: str | None = None
#: The CUDA library's build; None where it is not loaded.
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
    def kernel(*_: Any) -> NoReturn:
        raise RuntimeError(f"{NAMESPACE}::{name} cannot run on CUDA tensors: {cuda_missing}.")

    return kernel


if cuda_missing and torch.version.cuda:
    _refusals = torch.library.Library(NAMESPACE, "IMPL")
    for _name in OPERATORS:
        _refusals.impl(_name, _refuse_cuda(_name), "CUDA")
