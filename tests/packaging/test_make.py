"""The torch that `make` takes: that of TORCH=, .venv's own, the active environment's, or a download.

Nothing is downloaded: the index is switched off, and wheels with nothing but a version stand for torch.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def write_wheel(folder: Path, version: str) -> Path:
    """A wheel of a torch that has a version and nothing else."""
    folder.mkdir(exist_ok=True)
    info = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / f"torch-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile alone, where wheels of torch 2.12.0 and 2.13.0 can be had."""
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    for version in ("2.12.0", "2.13.0"):
        write_wheel(tmp_path / "wheels", version)
    return tmp_path


def active_environment(folder: Path, version: str | None) -> Path:
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    if version is not None:
        zipfile.ZipFile(write_wheel(folder / "wheels", version)).extractall(packages)
    return packages


def make(project: Path, *arguments: str, active: Path | None = None) -> list[str]:
    """The words of the last line of `make torch`: torch, its version, in, its folder."""
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "TORCH", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    if active is not None:
        environment["VIRTUAL_ENV"] = str(active)
    command = ["make", "torch", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1].split()


def test_a_torch_that_is_asked_for(project: Path) -> None:
    active = project / "active"
    active_environment(active, "2.11.0")
    assert make(project, "TORCH=torch==2.12.0", active=active)[1] == "2.12.0"
    assert make(project, active=active)[1] == "2.12.0", "that of .venv is kept"
    assert make(project, "TORCH=torch==2.13.0")[1] == "2.13.0", "unless another is asked for"


def test_the_torch_of_the_active_environment(project: Path) -> None:
    active = project / "active"
    packages = active_environment(active, "2.11.0")
    before = sorted(packages.rglob("*"))
    for _ in range(2):
        assert make(project, active=active) == ["torch", "2.11.0", "in", str(packages)]
    assert sorted(path for path in packages.rglob("*") if "__pycache__" not in path.parts) == before
    assert make(project) == ["torch", "2.11.0", "in", str(packages)], "also where it is active no longer"


@pytest.mark.parametrize("version", [None, "2.9.1"])
def test_an_active_environment_without_a_torch_that_serves(version: str | None, project: Path) -> None:
    active = project / "active"
    active_environment(active, version)
    assert make(project, active=active)[1] == "2.13.0"


def test_no_environment(project: Path) -> None:
    torch = make(project)
    assert torch[1] == "2.13.0"
    assert str(project / ".venv") in torch[3]
