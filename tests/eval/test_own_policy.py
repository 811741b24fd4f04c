"""Policies of one's own: the documented example, entry points, and classes that are no policies."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_eval import command_line
from quest_eval.policies import KVShape, LayerKV, Length, PagePolicy, make

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "eval" / "examples"
HQ, HKV, D, S = 6, 2, 64, 16


@pytest.fixture
def paths(monkeypatch):
    """Python's path is as before once a test has run, and the test's modules are forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("mean_key", "mine", "own"):
        sys.modules.pop(name, None)


def test_the_example_runs_beside_the_built_in_policies(paths, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(EXAMPLES)
    arguments = "run passkey --lengths 600 --tries 2 --budgets 64 608 --policies dense quest --policy mean_key:MeanKey"
    assert command_line.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    found = {(cell["policy"], cell["label"], cell["budget"]): cell for cell in cells}
    assert len(found) == 5
    own = {budget: found["mean_key:MeanKey", "mean key", budget] for budget in (64, 608)}
    assert own[608]["value"] == 1, "a budget that holds everything is dense"
    # A mean key takes half of the bytes of a minimum and a maximum.
    keys = own[608]["kv_bytes_read"] - own[608]["kv_bytes_dense"]
    bounds = found["quest", "Quest, max", 608]["kv_bytes_read"] - own[608]["kv_bytes_dense"]
    assert keys == pytest.approx(bounds / 2)
    assert "mean key" in capsys.readouterr().out


def test_the_example_selects_by_the_mean_of_the_keys(paths, monkeypatch, device):
    monkeypatch.chdir(EXAMPLES)
    random = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, HKV, 256, D, generator=random)
    k[:, :, 170:] = float("nan")  # not written yet
    length = Length(2, 150, torch.device(device))
    kv = LayerKV(k.to(device), v.to(device), length, 150, D**-0.5, torch.zeros(2, HQ, 1, D))
    reader = make("mean_key:MeanKey", 4 * S).start(kv)
    assert isinstance(reader.policy, PagePolicy)
    for tokens in range(151, 170):  # over the edge of a page, at 160
        length.set(tokens)
        q = torch.randn(2, HQ, D, generator=random)
        reader.attend(q.to(device))
        last = (tokens - 1) // S
        means = k[:, :, : last * S].double().unflatten(2, (last, S)).mean(3)
        scores = (q.double().unflatten(1, (HKV, -1)) @ means.transpose(-1, -2)).amax(2)
        wanted = scores.topk(3, -1).indices.sort(-1).values
        assert torch.equal(reader.pages.cpu()[..., :3], wanted.int())
        assert (reader.pages[..., 3] == last).all()


def test_the_documentation_shows_the_example():
    code = (EXAMPLES / "mean_key.py").read_text().partition('"""\n\n')[2]
    assert f"```python\n{code}```\n" in (ROOT / "eval" / "README.md").read_text()


def test_bytes_of_the_example(paths, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    policy, shape = make("mean_key:MeanKey", 64), KVShape(query_heads=8, kv_heads=2, head_dim=64, itemsize=2)
    # 1000 tokens are 63 pages: three whole ones and the last, with 8 tokens, and a key of each.
    assert policy.bytes_read(shape, 990, 1000) == (3 * 16 + 8) * 512 + 63 * 256
    assert policy.bytes_held(shape, 990, 1000) == 1000 * 512 + 63 * 256


def test_an_installed_package_adds_a_policy(paths, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text((EXAMPLES / "mean_key.py").read_text())
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quest_eval.policies]\nmine = mine:MeanKey\n")
    monkeypatch.syspath_prepend(tmp_path)
    policy = make("mine", 64, dense_layers=1)
    assert (policy.name, policy.label(), policy.budget, policy.dense_layers) == ("mine", "mean key", 64, 1)
    with pytest.raises(ValueError, match="policy must be one of dense, .*, mine, or module:Class, got 'yours'"):
        make("yours", 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:Best", r"policy nowhere:Best cannot be imported \(No module named 'nowhere'\)"),
        ("own:Best", r"policy own:Best cannot be imported \(module 'own' has no attribute 'Best'\)"),
        ("own:Other", r"policy own:Other must be a subclass of quest_eval\.policies\.Policy, got <class 'own.Other'>"),
        ("own:Half", "policy own:Half must define start, see quest_eval.policies.Policy"),
    ],
)
def test_a_class_that_is_no_policy_is_one_sentence(name, message, paths, monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text(
        "from quest_eval.policies import Policy\n\n\nclass Other:\n    pass\n\n\n"
        "class Half(Policy):\n    def label(self):\n        return 'half'\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(name, 64)
