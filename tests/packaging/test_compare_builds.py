"""bench/compare_builds.py finds a build equal to itself, and names the cases where two builds differ."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from quest_ops import _library

SCRIPT = Path(__file__).parents[2] / "bench" / "compare_builds.py"
LIBRARY = _library._find("_C")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_builds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_builds"] = module
    spec.loader.exec_module(module)
    return module


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments, "--cases", "3"]
    return subprocess.run(command, text=True, capture_output=True, timeout=300, check=False)


def test_a_build_equals_itself() -> None:
    done = compare(LIBRARY.parent, LIBRARY.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 different, 0 skipped" in done.stdout


def test_another_error_message_is_a_difference(tmp_path: Path) -> None:
    """End to end, on a library whose one sentence was changed in the file."""
    data, sentence = LIBRARY.read_bytes(), b"sink_pages must be at least 0"
    assert sentence in data
    (tmp_path / "_C.so").write_bytes(data.replace(sentence, b"sink_pages must be at least 7"))
    done = compare(LIBRARY.parent, tmp_path)
    assert done.returncode == 1
    assert "  topk_pages with sink_pages: -1\n" in done.stdout
    assert "      old sink_pages must be at least 0, got -1\n" in done.stdout
    assert "      new sink_pages must be at least 7, got -1\n" in done.stdout
    assert compare(LIBRARY.parent, tmp_path, "--skip", "sink_pages").returncode == 0


def test_a_build_that_does_not_load_fails(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert compare(LIBRARY.parent, tmp_path).returncode == 1


def test_differences_name_cases_and_results(script: ModuleType) -> None:
    old = {"a": {"out": "1", "lse": "2"}, "b": {"out": "3"}}
    assert script.differences(old, old) == {}
    assert script.differences(old, {**old, "a": {"out": "1", "lse": "9"}}) == {"a": ["lse"]}
    assert script.differences(old, {**old, "a": {"out": "1"}}) == {"a": ["lse"]}
    assert script.differences({"a": old["a"]}, old) == {"b": ["out"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8])
def test_a_digest_sees_every_bit_but_which_nan_it_is(script: ModuleType, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[-1] ^= 1
    assert script.digest(changed) != script.digest(tensor)
    assert script.digest(tensor.view(5, 3)) != script.digest(tensor)
    assert script.digest(tensor.t().contiguous().t()) == script.digest(tensor)
    if dtype.is_floating_point:
        zero, nan = torch.zeros(1, dtype=dtype), torch.full((1,), torch.nan, dtype=dtype)
        assert script.digest(-zero) != script.digest(zero)
        other_nan = nan.clone()
        other_nan.view(torch.uint8)[-1] ^= 128  # its sign
        assert script.digest(other_nan) == script.digest(nan)


def test_a_case_is_the_same_in_every_process(script: ModuleType) -> None:
    first, again, other = (script.draw_shape(script.Draw(seed), 2**20) for seed in (5, 5, 6))
    assert first == again != other


def test_only_the_place_in_the_source_is_left_out_of_a_message(script: ModuleType) -> None:
    error = RuntimeError("check_rows, csrc/cpu/../check_tensors.h:149, q must have shape [B, Hq, D], got [1]")
    assert script.message(error) == "q must have shape [B, Hq, D], got [1]"
