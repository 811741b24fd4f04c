"""The wheels and their content, the stable ABI of the libraries, and the errors of CMake where it cannot build.

`QUEST_OPS_WHEEL` names a wheel of quest_ops to test. Without it one is built, in the installed libraries' build folder.
"""

import hashlib
import importlib.resources
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import quest_ops
import quest_ops.ops
from quest_ops import _library

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]

pytestmark = pytest.mark.xdist_group("packaging")  # one process builds in the build folder

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None or shutil.which("cmake") is None,
    reason="needs scikit-build-core and CMake",
)


def check_abi(library: Path) -> None:
    tool = shutil.which("torch-abi-audit")
    if tool is None:
        pytest.skip("needs torch-abi-audit")
    report = json.loads(subprocess.run([tool, "--json", library], capture_output=True, check=True).stdout)
    (found,) = [entry["torch"] for entry in report["bundled_libs"]]
    assert found["uses_torch"]
    assert found["stable"], found["unstable_symbols"]
    assert found["unknown_shim_symbols"] == []
    assert tuple(map(int, found["min_torch_version"].split(".")[:2])) <= _library.MINIMUM_TORCH


def check_dependencies(library: Path) -> None:
    """Torch and the C++ runtime: no CUDA runtime, no Python, and no folder of the machine that built it."""
    if sys.platform != "linux" or shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic))
    assert needed & {"libtorch", "libtorch_cpu"}
    assert needed <= {"libtorch", "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert str(ROOT).encode() not in library.read_bytes()


@pytest.mark.parametrize("stem", ["_C", "_C_cuda"])
def test_installed_library(stem: str) -> None:
    library = _library._find(stem)
    if library is None:
        pytest.skip(f"no {stem} is installed")
    check_abi(library)
    check_dependencies(library)


def test_one_version() -> None:
    assert VERSION == quest_ops.__version__ == metadata.version("quest_ops")
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_resources() -> None:
    # They must be found in an editable install too, where the libraries lie apart from the Python files.
    files = importlib.resources.files("quest_ops")
    for name in ("py.typed", "_C.so"):
        assert files.joinpath(name).is_file(), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("QUEST_OPS_WHEEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-C", f"build-dir={ROOT / 'build'}"] if (ROOT / "build" / "CMakeCache.txt").exists() else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, *build, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of a new environment that holds this wheel, and sees torch in ours."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # Lines of a .pth file in that folder are not read again, so our own quest_ops stays out of sight.
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return packages


@needs_builder
def test_wheel_name(wheel: Path) -> None:
    assert re.fullmatch(rf"quest_ops-{re.escape(VERSION)}-py3-none-(linux|macosx|manylinux)_\w+\.whl", wheel.name)


@needs_builder
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    package = ROOT / "python" / "quest_ops"
    ours = {f"quest_ops/{f.relative_to(package).as_posix()}" for f in package.rglob("*") if f.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert "quest_ops/py.typed" in ours
    libraries = {"quest_ops/_C.so", "quest_ops/_C_cuda.so"} & names
    assert "quest_ops/_C.so" in libraries
    info = f"quest_ops-{VERSION}.dist-info"
    rest = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert names == ours | libraries | rest


@needs_builder
def test_wheel_is_small_and_holds_no_evaluation(wheel: Path) -> None:
    entries = [entry for entry in zipfile.ZipFile(wheel).infolist() if not entry.filename.endswith("_C_cuda.so")]
    assert sum(entry.compress_size for entry in entries) < 2**20, "a CPU build is under 1 MiB"
    evaluation = [entry.filename for entry in entries if re.search(r"eval|safetensors|config[.]json", entry.filename)]
    assert not evaluation


@needs_builder
def test_wheel_metadata(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read(f"quest_ops-{VERSION}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.10" in text
    assert re.search(r"^Requires-Dist: torch>=2\.10$", text, re.MULTILINE)
    assert "Project-URL: Paper, https://arxiv.org/abs/2406.10774" in text
    assert "License-Expression: BSD-3-Clause" in text
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE)) == {"transformers", "test", "dev"}
    entries = zipfile.ZipFile(wheel).read(f"quest_ops-{VERSION}.dist-info/entry_points.txt").decode()
    assert "[vllm.general_plugins]\nquest_ops" in entries


@needs_builder
def test_wheel_libraries(unpacked: Path) -> None:
    for library in (unpacked / "quest_ops").glob("*.so"):
        check_abi(library)
        check_dependencies(library)


def run_in(packages: Path, *arguments: str | Path, cwd: Path) -> str:
    """The output of the Python of the environment with these site-packages."""
    python = packages.parents[2] / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_that_it_runs(packages: Path, tmp_path: Path) -> None:
    program = """
import torch, quest_ops
q, bounds = torch.ones(1, 2, 64), torch.ones(1, 1, 2, 64)
one = torch.ones(1, dtype=torch.int32)
print(quest_ops.__file__, quest_ops.estimate(q, bounds, one[None] - 1, one, 16).tolist())
"""
    printed = run_in(packages, "-c", program, cwd=tmp_path)
    assert printed.split(maxsplit=1) == [str(packages / "quest_ops" / "__init__.py"), "[[[64.0], [64.0]]]\n"]


@needs_builder
def test_wheel_in_a_new_environment(unpacked: Path, tmp_path: Path) -> None:
    check_that_it_runs(unpacked, tmp_path)


@needs_builder
@pytest.mark.slow
def test_operators_of_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    """The wheel on the torch of this environment. Its minimum is in the symbols, see check_abi."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = tests\nmarkers =\n gpu: needs a GPU\n slow: is slow\n")
    folder = Path("tests/operators")
    files = ("test_bad_input_table.py", "test_written_tensors.py", "test_determinism.py", "test_ragged_steps.py")
    words = ["-k", "not compiled and not cuda"]
    run_in(unpacked, "-m", "pytest", "-q", "-x", *words, *(folder / file for file in files), cwd=tmp_path)
    assert not (tmp_path / "python").exists()


@needs_builder
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf")
def test_the_tag_of_the_wheel_is_true(wheel: Path, unpacked: Path) -> None:
    """A manylinux_2_X wheel asks for symbols of glibc 2.X at most."""
    promised = re.search(r"manylinux_(\d+)_(\d+)", wheel.name)
    if promised is None:
        pytest.skip(f"{wheel.name} promises no glibc")
    for library in (unpacked / "quest_ops").glob("*.so"):
        text = subprocess.run(["readelf", "--version-info", library], capture_output=True, text=True, check=True).stdout
        needed = [tuple(map(int, version.split("."))) for version in re.findall(r"Name: GLIBC_([\d.]+)", text)]
        assert max(needed) <= tuple(map(int, promised.groups())), library.name


@needs_builder
@pytest.mark.slow
def test_sdist_in_a_new_environment(tmp_path: Path) -> None:
    """The sdist is built and installed where there are torch and the build tools, and nothing of this project."""
    make = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", make, tmp_path / "dist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = (tmp_path / "dist").glob("quest_ops-*.tar.gz")
    venv.create(tmp_path / "environment", symlinks=True)
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    options = ["--no-build-isolation", "--no-deps", "--force-reinstall", "-C", "cmake.define.QUEST_CUDA=OFF"]
    # Installed by our pip into a folder: the new environment sees our quest_ops, which pip would uninstall.
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", packages, sdist]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check_that_it_runs(packages, tmp_path)
    check_abi(packages / "quest_ops" / "_C.so")


def test_libraries_have_the_schemas_of_this_source() -> None:
    """A library that was not rebuilt after a change of the schemas fails here."""
    schemas = hashlib.sha256((ROOT / "csrc" / "register.cpp").read_bytes()).hexdigest()[:12]
    assert _library.build_info["schemas"] == schemas
    if _library.cuda_build_info is not None:
        assert _library.cuda_build_info["schemas"] == schemas


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_python_has_the_arguments_of_the_schema(name: str) -> None:
    """Names, order and defaults. Ways to reduce have words in Python and numbers in the schema."""
    schema = getattr(_library.ops, name).default._schema
    parameters = inspect.signature(getattr(quest_ops.ops, name)).parameters
    assert list(parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = parameters[argument.name].default
        if argument.name == "group_reduce":
            default = quest_ops.ops.GROUP_REDUCE[default]
        if argument.name == "token_reduce":
            default = quest_ops.ops.TOKEN_REDUCE[default]
        wanted = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert default == wanted, argument.name


def run_cmake(tmp_path: Path, *options: str, **environment: str) -> tuple[int, str]:
    """CMake's exit status as it configures, and its words on one line."""
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}", *options]
    inherited = {name: value for name, value in os.environ.items() if name not in ("QUEST_CUDA", "CUDAARCHS")}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def configure(tmp_path: Path, *options: str, **environment: str) -> str:
    """What CMake says as it refuses to configure."""
    status, words = run_cmake(tmp_path, *options, **environment)
    assert status != 0, words
    return words


def fake_torch(tmp_path: Path, version: str, *libraries: str) -> str:
    """A folder for PYTHONPATH with a torch of that version, of the files that CMake looks at."""
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "torch" / "__init__.py").touch()
    names = ("MAJOR", "MINOR", "PATCH")
    lines = (f"#define TORCH_VERSION_{name} {part}" for name, part in zip(names, version.split("."), strict=True))
    header.write_text("\n".join(lines))
    (tmp_path / "torch" / "lib").mkdir(exist_ok=True)
    for library in libraries:
        (tmp_path / "torch" / "lib" / f"lib{library}.so").touch()
    return str(tmp_path)


CPU_TORCH = ("torch_cpu", "torch")
CUDA_TORCH = (*CPU_TORCH, "torch_cuda")


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> str:
    """An nvcc that notes each of its calls in a file beside it, and fails."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\nexit 1\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@needs_builder
@pytest.mark.parametrize("choice", [None, "AUTO"])
def test_a_cpu_torch_leaves_cuda_out(choice: str | None, broken_nvcc: str, tmp_path: Path) -> None:
    torch = fake_torch(tmp_path, "2.13.0", *CPU_TORCH)
    environment = {} if choice is None else {"QUEST_CUDA": choice}
    status, words = run_cmake(tmp_path, PYTHONPATH=torch, CUDACXX=broken_nvcc, **environment)
    assert status == 0, words
    assert "torch 2.13.0 is not built for CUDA: the CUDA library is left out" in words
    assert not (tmp_path / "calls").exists()


@needs_builder
def test_an_nvcc_that_does_not_work_leaves_cuda_out(broken_nvcc: str, tmp_path: Path) -> None:
    torch = fake_torch(tmp_path, "2.13.0", *CUDA_TORCH)
    status, words = run_cmake(tmp_path, PYTHONPATH=torch, CUDACXX=broken_nvcc)
    assert status == 0, words
    assert "no nvcc that works: the CUDA library is left out" in words
    assert (tmp_path / "calls").exists()


@needs_builder
def test_cuda_wanted_without_nvcc(tmp_path: Path) -> None:
    message = configure(tmp_path, "-DQUEST_CUDA=ON", CUDACXX=str(tmp_path / "nvcc"))
    assert "QUEST_CUDA=ON needs nvcc" in message
    assert "install the CUDA toolkit" in message


@needs_builder
def test_the_environment_decides_about_cuda(broken_nvcc: str, tmp_path: Path) -> None:
    shared = {"PYTHONPATH": fake_torch(tmp_path, "2.13.0", *CUDA_TORCH), "CUDACXX": broken_nvcc}
    status, words = run_cmake(tmp_path, QUEST_CUDA="OFF", **shared)
    assert status == 0, words
    assert "QUEST_CUDA=OFF: the CUDA library is left out" in words
    # In the same build folder: a later environment counts, and an argument counts more.
    assert "QUEST_CUDA=ON needs nvcc" in configure(tmp_path, QUEST_CUDA="ON", **shared)
    status, words = run_cmake(tmp_path, "-DQUEST_CUDA=OFF", QUEST_CUDA="ON", **shared)
    assert status == 0, words


@needs_builder
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_without_cutlass(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    python = f"-DPython_EXECUTABLE={tmp_path / 'empty' / 'bin' / 'python'}"
    torch = fake_torch(tmp_path, "2.13.0", *CUDA_TORCH)
    message = configure(tmp_path, python, PYTHONPATH=torch, CUDAARCHS="90a")
    assert "run `pip install nvidia-cutlass`, or build without it by QUEST_CUDA=OFF" in message


@needs_builder
def test_unknown_cuda_choice(tmp_path: Path) -> None:
    assert "QUEST_CUDA must be AUTO, ON or OFF, got perhaps" in configure(tmp_path, "-DQUEST_CUDA=perhaps")
    assert "QUEST_CUDA must be AUTO, ON or OFF, got maybe" in configure(tmp_path / "other", QUEST_CUDA="maybe")


@needs_builder
def test_headers_older_than_the_target(tmp_path: Path) -> None:
    message = configure(tmp_path, PYTHONPATH=fake_torch(tmp_path, "2.9.1"))
    assert "needs torch 2.10 or newer to build, found 2.9.1" in message
    assert "pip install 'torch>=2.10'" in message


@needs_builder
def test_no_torch(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    message = configure(tmp_path, f"-DPython_EXECUTABLE={tmp_path / 'empty' / 'bin' / 'python'}")
    assert "has none: run `pip install torch`" in message


# quest_eval


def test_resources_of_the_evaluation() -> None:
    files = importlib.resources.files(pytest.importorskip("quest_eval"))
    for name in ("py.typed", "bundled_model/config.json", "bundled_model/model.safetensors"):
        assert files.joinpath(*name.split("/")).is_file(), name


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling")
def test_wheel_of_the_evaluation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT / "eval"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("quest_eval-*-py3-none-any.whl")
    wheel, package = zipfile.ZipFile(path), ROOT / "eval" / "quest_eval"
    files = {f"quest_eval/{f.relative_to(package).as_posix()}" for f in package.rglob("*") if f.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    info = path.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    rest = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.namelist()) == files | rest
    assert "quest-eval = quest_eval.command_line:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "BSD 3-Clause" in wheel.read(f"{info}/licenses/LICENSE").decode()
