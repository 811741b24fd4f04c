"""A short soak, and the faults that it must find. `make soak` runs the long one."""

from __future__ import annotations

import pytest
import soak
import torch
from quest_ops.kv_state import KVState


def test_a_short_soak(device: str) -> None:
    runs = [soak.run(300, device, seed=1) for _ in range(2)]
    assert soak.judge(runs, device) == []
    assert sum(runs[0]["calls"].values()) > 310
    assert soak.run(20, device, seed=2)["digest"] != soak.run(20, device, seed=3)["digest"]


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = soak.run(300, "cpu", seed=1)
    assert "memory grew by 20000000 bytes" in soak.judge([{**steady, "memory": [10**8] * 9 + [12 * 10**7]}], "cpu")
    assert soak.judge([steady, {**steady, "digest": "0"}], "cpu") == ["a rerun gave other bits"]
    append = KVState.append
    # A layer that loses some of its tokens reads slots that hold NaN.
    monkeypatch.setattr(KVState, "append", lambda *a: torch.rand(()) < 0.1 or append(*a))
    assert "outputs were not finite: a freed page was read" in soak.judge([soak.run(300, "cpu", seed=1)], "cpu")
