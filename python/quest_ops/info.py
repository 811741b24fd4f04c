"""``python -m quest_ops info``: the installed versions, the targets of the build, and whether they go together."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from typing import Any

import torch

from . import _library


def report() -> list[tuple[str, str]]:
    """Pairs of a name and its description, in the order of printing."""
    cpu, cuda = _library.build_info, _library.cuda_build_info
    return [
        ("quest_ops", f"{cpu['version']}, operators in torch.ops.{_library.NAMESPACE}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads"),
        ("transformers", _transformers()),
        ("CPU library", f"loaded, instruction set {cpu['cpu_isa']}, compiled by {cpu['compiler']}, {_build(cpu)}"),
        ("CUDA library", _cuda(cuda) if cuda else f"not loaded: {_library.cuda_missing}"),
        ("GPU", _gpus()),
        ("build matches", _match(cpu, cuda)),
    ]


#: The versions of transformers that the tests ran with, as an argument of pip: those of the extra "transformers".
TRANSFORMERS = "transformers>=5.17,<5.25"


def _transformers() -> str:
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return f"not installed: run `pip install '{TRANSFORMERS}'`"
    first, last = re.findall(r"[0-9.]+", TRANSFORMERS)
    if _numbers(first) <= _numbers(found) < _numbers(last):
        return found
    return f"{found}, which was not tested: run `pip install '{TRANSFORMERS}'`"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


def _build(info: dict[str, Any]) -> str:
    return f"{info['build_type']} build with torch {info['torch_headers']} for torch {info['torch_target']} or newer"


def _cuda(info: dict[str, Any]) -> str:
    return f"loaded, architectures {info['architectures']}, nvcc {info['nvcc']}, {_build(info)}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})" for gpu in gpus)


def _match(cpu: dict[str, Any], cuda: dict[str, Any] | None) -> str:
    """Whether the libraries go with the installed versions and GPUs, or the first thing that does not."""
    try:
        version = metadata.version("quest_ops")
    except metadata.PackageNotFoundError:  # run from its folder
        version = cpu["version"]
    if version != cpu["version"]:
        return f"no: the Python files are {version}, the CPU library is {cpu['version']}: reinstall quest_ops"
    if _numbers(torch.__version__) < _numbers(cpu["torch_target"]):
        return f"no: the CPU library needs torch {cpu['torch_target']}, this is {torch.__version__}: rebuild quest_ops"
    if cuda and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            if not _serves(cuda["architectures"].split(), gpu.major, gpu.minor):
                return (
                    f"no: the CUDA library has {cuda['architectures']} and none for {gpu.name} "
                    f"({gpu.major}.{gpu.minor}): rebuild with CUDAARCHS={gpu.major}{gpu.minor}"
                )
    return "yes"


def _serves(architectures: list[str], major: int, minor: int) -> bool:
    """Whether CMake's architectures hold code for a GPU: machine code of its generation, or PTX that is no newer."""
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        digits = number.rstrip("af")
        have = int(digits[:-1]), int(digits[-1])
        if digits != number:  # 90a and the like run on that processor alone
            if have == (major, minor):
                return True
        elif (have[0] == major and have[1] <= minor) or (kind != "real" and have <= (major, minor)):
            return True
    return False
