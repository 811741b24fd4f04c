"""Devices and hypothesis profiles of all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Cases are made by torch from a drawn seed, and the reference loops: slow inputs are expected.
settings.register_profile(
    "quest_ops",
    max_examples=int(os.environ.get("QUEST_OPS_TEST_EXAMPLES", "50")),
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("quest_ops")

# The cases are small: threads would spend most of their time waiting for each other, and for the tests that run beside.
# What several threads could get wrong is tested in test_determinism.py.
torch.set_num_threads(1)

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)  # `pytest -m gpu` runs all that needs one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(scope="session", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Where the operators run. The reference and the cases stay on the CPU."""
    return request.param


_PACKAGE_OF_TORCH_ALONE = """
import sys, torch
program = torch.export.export(torch.nn.ReLU(), (torch.randn(3),))
torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1]))
"""


@pytest.fixture
def aotinductor(tmp_path: Path) -> None:
    """Skips where this torch cannot load any package.

    With torch 2.11, loading one crashes the process in std::regex unless the system's libstdc++ is preloaded.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        command = [sys.executable, "-c", _PACKAGE_OF_TORCH_ALONE, str(tmp_path / "relu.pt2")]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("AOTInductor of this torch cannot load a package without quest_ops either")
