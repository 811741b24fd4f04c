"""Sizes whose products pass 32 bits, in expanded tensors: little memory holds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quest_ops import ops

GIBIBYTE = 2**30

_ESTIMATE = """
import sys, torch
from quest_ops import ops
torch.set_num_threads(1)
heads, D = int(sys.argv[1]), int(sys.argv[2])
q = torch.arange(-D // 2, D // 2, dtype=torch.float32).expand(1, heads, D)
bounds = torch.stack([torch.full((D,), -2.0), torch.full((D,), 3.0)])[None, None]
lens = torch.ones(1, dtype=torch.int32)
scores = ops.estimate(q, bounds, torch.zeros(1, 1, dtype=torch.int32), lens, 16)
right = (q[0, 0].clamp(min=0) * 3 + q[0, 0].clamp(max=0) * -2).sum()
assert scores.shape == (1, heads, 1)
assert bool((scores == right).all()), scores.unique()
"""


def free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim"), [(2**24 + 8, 64), (2**22 + 8, 256)])
def test_estimate_with_many_query_heads(heads: int, head_dim: int) -> None:
    """The numbers in both signed parts of the queries pass 2^31. A crash ends the process."""
    if free_memory() < 12 * GIBIBYTE:
        pytest.skip("needs 12 GiB of free memory")
    command = [sys.executable, "-c", _ESTIMATE, str(heads), str(head_dim)]
    subprocess.run(command, check=True, timeout=300)


def test_a_number_of_heads_whose_results_fit_no_memory_is_an_error() -> None:
    q = torch.zeros(1, 8, 1, 64).expand(1, 8, 2**31 - 1, 64)
    cache, table, lens = (
        torch.zeros(1, 1, 16, 64),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
    )
    with pytest.raises(RuntimeError):
        ops.sparse_decode(q, cache, cache, table, lens)


def test_estimate_of_no_pages_takes_no_memory() -> None:
    """The queries' signed parts would take 8.8 TB, and the result is empty."""
    q = torch.zeros(1, 1, 1, 64).expand(1, 8, 2**31 - 1, 64)
    bounds, table = torch.zeros(1, 1, 2, 64), torch.zeros(1, 0, dtype=torch.int32)
    assert ops.estimate(q, bounds, table, torch.zeros(1, dtype=torch.int32), 16).shape == (1, 8, 2**31 - 1, 0)
