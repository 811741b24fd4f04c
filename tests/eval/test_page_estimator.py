"""examples/page_estimator.py: one estimator for both hooks, and a bound of each key's product with the query."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_ops import LayerPages, QuestConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
B, T, HQ, HKV, S, D = 2, 1, 4, 2, 16, 64
LENGTHS = torch.tensor([70, 33], dtype=torch.int32)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield __import__("page_estimator")
    sys.modules.pop("page_estimator")


@pytest.fixture
def layer():
    """A query [B, T, Hq, D], keys [B, Hkv, P * S, D] with NaN past the lengths, and the same keys in shuffled pages."""
    torch.manual_seed(0)
    q, keys = torch.randn(B, T, HQ, D), torch.randn(B, HKV, 5 * S, D)
    keys[torch.arange(5 * S) >= LENGTHS[:, None].expand(B, 5 * S)[:, None, :].expand(B, HKV, -1)] = torch.nan
    table = torch.randperm(10, dtype=torch.int32).view(B, 5)
    pool = torch.zeros(10, HKV, S, D)
    pool[table.long()] = keys.unflatten(2, (5, S)).transpose(1, 2)
    return q, keys, LayerPages(pool, pool, pool, None, table, LENGTHS, 1.0)


def test_scores_bound_the_products(example, layer):
    q, keys, pages = layer
    scores = example.select_by_ball(0, q, pages, QuestConfig())
    assert scores.shape == (B, T, HQ, 5)
    assert scores.dtype == torch.float32
    products = torch.einsum("bthgd,bhnd->bthgn", q.unflatten(2, (HKV, -1)), keys).flatten(2, 3)
    best = products.unflatten(3, (5, S)).nan_to_num(nan=-torch.inf).amax(-1)
    held = best > -torch.inf
    assert held.sum() == HQ * (5 + 3)
    assert (scores[held] >= best[held] - 1e-4).all()
    torch.testing.assert_close(scores[1, ..., 2], best[1, ..., 2])  # a page of one token: its radius is 0


def test_both_hooks_have_the_same_scores(example, layer):
    q, keys, pages = layer
    expected = example.select_by_ball(0, q, pages, QuestConfig())
    for row, length in enumerate(LENGTHS.tolist()):
        kv = SimpleNamespace(k=keys[row : row + 1], length=SimpleNamespace(tokens=length))
        reader = object.__new__(example.BallReader)
        reader.kv, reader.policy = kv, SimpleNamespace(page_size=S)
        torch.testing.assert_close(reader.scores(q[row : row + 1, 0]), expected[row])


def test_the_script_runs(tmp_path):
    options = ["--lengths", "1100", "--budgets", "64", "--tries", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "page_estimator.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ball" in done.stdout
    assert "The pass key of Gifanoza is 66576" in done.stdout
    assert done.stdout.count("sparse ") == 4
