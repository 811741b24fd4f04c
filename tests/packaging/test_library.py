"""Importing quest_ops where something is wrong: one sentence names the fault and the remedy.

Each case runs in a process of its own, on the libraries of its own folder.
"""

import json
import multiprocessing
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from quest_ops import _library

CPU = _library._find("_C")
CUDA = _library._find("_C_cuda")
REMEDY = "pip install --no-build-isolation"
ON_CUDA_TORCH = "torch.version.cuda = '13.0'"

# Processes are forked from one that has imported torch alone.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch"])


def run(folder: Path, before: str = "", after: str = "'imported'") -> str:
    """Imports quest_ops with the libraries in `folder`. Returns the error's message, or `after` as a string."""
    program = f"""
import importlib.resources, pathlib, torch
folder = pathlib.Path({str(folder)!r})
importlib.resources.files = lambda package: folder
{before}
try:
    from quest_ops import _library
    message = str({after})
except ImportError as error:
    message = str(error)
(folder / "message").write_text(message)
"""
    child = processes.Process(target=exec, args=(program, {}))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    return (folder / "message").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the CPU library alone."""
    shutil.copy(CPU, tmp_path / "_C.so")
    return tmp_path


def fake_cuda_library(folder: Path, tmp_path: Path, **changes: str) -> None:
    """A _C_cuda that loads anywhere and describes its build as _C does, but for `changes`."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    told = {key: _library.build_info[key] for key in ("namespace", "version", "schemas")} | changes
    source = tmp_path / "fake.cpp"
    body = json.dumps(json.dumps(told))
    source.write_text(f'extern "C" const char* quest_ops_cuda_build_info() {{ return {body}; }}')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", folder / "_C_cuda.so"], check=True)


def test_a_good_folder_imports(folder: Path) -> None:
    assert run(folder) == "imported"


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "1.13.0"])
def test_torch_too_old(folder: Path, version: str) -> None:
    message = run(folder, f"torch.__version__ = {version!r}")
    assert message == f"quest_ops needs torch 2.10 or newer, found {version}: run `pip install 'torch>=2.10'`."


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.11.0.dev20260101+cpu", "3.0.0"])
def test_torch_new_enough(folder: Path, version: str) -> None:
    assert run(folder, f"torch.__version__ = {version!r}") == "imported"


def test_no_library(tmp_path: Path) -> None:
    message = run(tmp_path)
    assert "no compiled library _C" in message
    assert REMEDY in message


def test_a_file_that_is_not_the_library(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    message = run(tmp_path)
    assert "something other than its library" in message
    assert REMEDY in message


def test_a_damaged_library(folder: Path) -> None:
    data = (folder / "_C.so").read_bytes()
    (folder / "_C.so").write_bytes(b"\0" * 64 + data[64:])
    message = run(folder)
    assert f"could not load _C.so with torch {torch.__version__}" in message
    assert REMEDY in message


def test_a_taken_namespace(folder: Path) -> None:
    # Without the check, torch ends the process as the library loads.
    taken = (
        f"other = torch.library.Library({_library.NAMESPACE!r}, 'DEF'); other.define('estimate(Tensor x) -> Tensor')"
    )
    message = run(folder, taken)
    assert f"has taken torch.ops.{_library.NAMESPACE}" in message
    assert "QUEST_NAMESPACE" in message


def test_the_same_library_loaded_before(folder: Path) -> None:
    assert run(folder, f"torch.ops.load_library({str(folder / '_C.so')!r})") == "imported"


def test_a_library_older_than_the_python_files(folder: Path) -> None:
    data = (folder / "_C.so").read_bytes()
    assert b"topk_pages(Tensor" in data
    (folder / "_C.so").write_bytes(data.replace(b"topk_pages", b"tops_pages"))
    message = run(folder)
    assert "older than its Python files, without topk_pages" in message
    assert REMEDY in message


def test_cpu_torch_leaves_the_cuda_library_alone(folder: Path) -> None:
    (folder / "_C_cuda.so").write_bytes(b"never opened")
    message = run(folder, "torch.version.cuda = None", "_library.cuda_missing")
    assert message == f"torch {torch.__version__} is not built for CUDA"


def test_no_cuda_library_on_a_cuda_torch(folder: Path) -> None:
    # The import succeeds, for use on the CPU. CUDA tensors then raise.
    before = f"""{ON_CUDA_TORCH}
def refusal(library):
    x = torch.zeros(1)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        library.ops.estimate.default.redispatch(cuda, x, x, x, x, 16)
    except RuntimeError as error:
        return error
"""
    message = run(folder, before, "refusal(_library)")
    assert "quest::estimate cannot run on CUDA tensors: this build of quest_ops has no CUDA library" in message
    assert "QUEST_CUDA=ON" in message


@pytest.mark.parametrize("changes", [{"version": "0.0.1"}, {"schemas": "0123456789ab"}, {"namespace": "other"}])
def test_libraries_of_different_builds(folder: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    fake_cuda_library(folder, tmp_path, **changes)
    message = run(folder, ON_CUDA_TORCH)
    (key, value), ours = *changes.items(), _library.build_info
    assert f"_C with {key} {ours[key]} and _C_cuda with {key} {value}" in message
    assert REMEDY in message


def test_libraries_of_one_build(folder: Path, tmp_path: Path) -> None:
    fake_cuda_library(folder, tmp_path)
    assert run(folder, ON_CUDA_TORCH, "_library.cuda_missing") == "None"


def test_a_cuda_library_that_does_not_load(folder: Path) -> None:
    (folder / "_C_cuda.so").write_bytes(b"damaged: quest_ops_cuda_build_info")
    message = run(folder, ON_CUDA_TORCH)
    assert f"could not load _C_cuda.so with torch {torch.__version__}" in message
    assert REMEDY in message


def test_the_wrong_file_as_cuda_library(folder: Path) -> None:
    shutil.copy(CPU, folder / "_C_cuda.so")
    message = run(folder, ON_CUDA_TORCH)
    assert "something other than its library" in message
    assert REMEDY in message


@pytest.mark.skipif(CUDA is None or torch.version.cuda is not None, reason="needs _C_cuda on a CPU torch")
def test_the_cuda_library_on_a_torch_without_cuda(folder: Path) -> None:
    shutil.copy(CUDA, folder / "_C_cuda.so")
    message = run(folder, ON_CUDA_TORCH)
    assert "could not load _C_cuda.so" in message
    assert REMEDY in message


def test_build_info() -> None:
    info = _library.build_info
    assert info["namespace"] == _library.NAMESPACE
    assert info["torch_target"] == ".".join(map(str, _library.MINIMUM_TORCH))
    assert info["cpu_isa"] in ("generic", "avx2", "avx512", "avx512_vnni")
    assert all(info[key] for key in ("version", "schemas", "torch_headers", "compiler", "build_type"))


def test_an_unknown_instruction_set(folder: Path) -> None:
    """Every operator raises before it starts threads, which would lose the message."""
    before = """
import os
os.environ["QUEST_OPS_ISA"] = "avx9"
def errors(library):
    x, lens = torch.zeros(1, 1, 64), torch.ones(1, dtype=torch.int32)
    new, cache, bounds = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 2, 64)
    calls = {
        "append_kv": (new, new, cache, cache.clone(), bounds, 0 * lens[None], 0 * lens),
        "update_bounds": (cache, bounds, 0 * lens[None], lens),
        "estimate": (x, bounds, 0 * lens[None], lens, 16),
        "topk_pages": (x[..., :1], lens, 16, 1, 1),
        "append_codes": (new, cache[..., :16].byte(), cache[..., 0], 0 * lens[None], 0 * lens),
        "rerank_pages": (x, cache[..., :16].byte(), cache[..., 0], 0 * lens[None], lens, 0 * lens[None, None]),
        "sparse_decode": (x, cache, cache, 0 * lens[None], lens),
        "decode_step": (x, new, new, cache, cache.clone(), bounds, 0 * lens[None], 0 * lens, lens, 1),
    }
    for name, arguments in calls.items():
        try:
            getattr(library.ops, name)(*arguments)
        except RuntimeError as error:
            yield str(error)
"""
    messages = run(folder, before, "list(errors(_library))")
    sentence = r"QUEST_OPS_ISA must be an instruction set of this processor \((\w+, )*generic\), got avx9"
    assert len(re.findall(sentence, messages)) == len(_library.OPERATORS)
    assert f"{_library.build_info['cpu_isa']}" in messages
