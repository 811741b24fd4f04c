"""Devices and hypothesis profiles of all tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Cases are made by torch from a drawn seed, and the reference loops: slow inputs are expected.
settings.register_profile(
    "quest_ops",
    max_examples=int(os.environ.get("QUEST_OPS_TEST_EXAMPLES", "30")),
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("quest_ops")

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(2)  # more would fight over the cores of the other workers

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"))


@pytest.fixture(scope="session", params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Where the operators run. The reference and the cases stay on the CPU."""
    return request.param
