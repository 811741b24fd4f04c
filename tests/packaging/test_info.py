"""`python -m quest_ops`: the report on the installation, and errors that name the remedy."""

import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from quest_ops import __main__, __version__, _library, info


def test_info_says_what_is_there():
    out = subprocess.run([sys.executable, "-m", "quest_ops", "info"], capture_output=True, text=True, check=True).stdout
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["quest_ops"].startswith(__version__)
    assert lines["torch"].startswith(torch.__version__)
    assert f"instruction set {_library.build_info['cpu_isa']}" in lines["CPU library"]
    assert lines["build matches"] == "yes"


def test_info_says_why_there_is_no_cuda_library(monkeypatch):
    monkeypatch.setattr(_library, "cuda_build_info", None)
    monkeypatch.setattr(_library, "cuda_missing", "it was left out")
    assert dict(info.report())["CUDA library"] == "not loaded: it was left out"


def test_info_names_what_does_not_match(monkeypatch):
    monkeypatch.setattr(_library, "build_info", {**_library.build_info, "version": "0.0.1"})
    assert "the CPU library is 0.0.1" in dict(info.report())["build matches"]


def test_info_names_a_gpu_that_there_is_no_code_for(monkeypatch):
    build = {**_library.build_info, "nvcc": "13.0.88", "architectures": "90a"}
    gpu = SimpleNamespace(name="some GPU", major=12, minor=0)
    monkeypatch.setattr(_library, "cuda_build_info", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    report = dict(info.report())
    assert report["GPU"] == "some GPU (compute capability 12.0)"
    assert report["build matches"].startswith("no: the CUDA library has 90a and none for some GPU (12.0)")
    gpu.major = 9
    assert dict(info.report())["build matches"] == "yes"


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80-real", (8, 6), True),
        ("80-real", (9, 0), False),
        ("80", (12, 0), True),
        ("86-real", (8, 0), False),
        ("90a 100-virtual", (12, 0), True),
        ("120", (9, 0), False),
    ],
)
def test_which_gpus_architectures_serve(architectures, capability, expected):
    assert info._serves(architectures.split(), *capability) is expected


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (None, "not installed: run `pip install 'transformers>=5.17,<5.25'`"),
        ("5.17.0", "5.17.0"),
        ("5.24.3", "5.24.3"),
        ("5.16.2", "5.16.2, which was not tested: run `pip install 'transformers>=5.17,<5.25'`"),
        ("5.25.0.dev0", "5.25.0.dev0, which was not tested: run `pip install 'transformers>=5.17,<5.25'`"),
    ],
)
def test_info_judges_transformers(installed, expected, monkeypatch):
    version = metadata.version

    def given(package):
        if package != "transformers":
            return version(package)
        if installed is None:
            raise metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(metadata, "version", given)
    assert dict(info.report())["transformers"] == expected


def test_the_extra_names_the_tested_transformers():
    (required,) = [line for line in metadata.requires("quest_ops") if line.startswith("transformers")]
    name, *bounds = re.split(r"(?=[<>])|,", required.partition(";")[0].strip())
    assert [name, *sorted(filter(None, bounds), reverse=True)] == ["transformers", *info.TRANSFORMERS[12:].split(",")]


def test_the_transformers_module_names_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import quest_ops.transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError: quest_ops.transformers needs transformers 5.17 or newer" in run.stderr
    assert f"run `pip install '{info.TRANSFORMERS}'`." in run.stderr


def test_the_version_is_printed():
    run = subprocess.run([sys.executable, "-m", "quest_ops", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"quest_ops {__version__}\n"


def test_no_command_prints_the_help(capsys):
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m quest_ops")
    assert "info" in out


@pytest.mark.parametrize("command", ["nonsense", "demo", "eval"])
def test_a_wrong_command_line_is_refused(command, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main([command])
    assert error.value.code == 2
    assert "usage: python -m quest_ops" in capsys.readouterr().err
