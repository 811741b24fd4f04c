"""The grid: interrupted runs, batches, cells and their numbers."""

import csv
import json
import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_eval import bundled_model, grid, policies, tasks
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.errors import InputError
from quest_eval.models import ByteTokenizer
from quest_eval.results import cells as results
from quest_eval.results.journal import Journal
from quest_eval.tasks.text import read_text

SETTINGS = {"seed": 0}
WAYS = [policies.make("dense", None), policies.make("quest", 64), policies.make("streaming", 64)]


@pytest.fixture(scope="module")
def setup():
    return tasks.Setup(ByteTokenizer(), read_text(None, ByteTokenizer()), tries=3, scored=20)


@pytest.fixture(scope="module")
def model(device):
    return bundled_model.load(device, torch.float32)


def go(model, setup, path, ways=WAYS, name="passkey", **options):
    task, journal = tasks.make(name, setup), Journal(path, SETTINGS)
    grid.run_grid(model, setup.tokenizer, [(task, 600, task.samples(600))], ways, journal, **options)
    return journal


def scores(journal):
    return {(r["policy"], s["index"]): (s["score"], s.get("answer")) for r in journal.records for s in r["samples"]}


def test_an_interrupted_run_goes_on_where_it_was(model, setup, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    whole = go(model, setup, path, batch=2)
    assert len(whole.records) == 2 * 3, "a record for each batch and policy"
    assert {score for (name, _), (score, _) in scores(whole).items() if name == "dense"} == {1.0}
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # cut off while the third record was written
    reads, prefill = [], PolicyDecoder.prefill

    def noted(self, ids, **options):
        reads.append(options["policies"])
        prefill(self, ids, **options)

    monkeypatch.setattr(PolicyDecoder, "prefill", noted)
    again = go(model, setup, path, batch=2)
    assert reads == [[WAYS[2]], WAYS], "what was finished is not run again"
    assert scores(again) == scores(whole)
    assert path.read_text().count("\n") == 7
    more = [policies.make("quest", 128), *WAYS]
    reads.clear()
    go(model, setup, path, more, batch=2)
    assert reads == [[more[0]], [more[0]]], "another budget is added to what there is"


def test_the_batch_size_changes_nothing(model, setup, tmp_path):
    together, alone = (go(model, setup, tmp_path / str(n), batch=n) for n in (3, 1))
    assert scores(together) == scores(alone)


def test_a_journal_of_another_run_is_refused(tmp_path):
    Journal(tmp_path / "journal.jsonl", {"seed": 0})
    with pytest.raises(InputError, match=r"is of a run with another seed \(0, now 1\): choose another --out"):
        Journal(tmp_path / "journal.jsonl", {"seed": 1})


def test_perplexity_is_that_of_the_model(model, setup, tmp_path):
    (record,) = go(model, setup, tmp_path / "journal", [WAYS[0]], "perplexity", batch=3).records
    ids = torch.tensor([s.ids for s in tasks.make("perplexity", setup).samples(600)], device=model.device)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        losses = -model(ids).logits[:, -21:-1].log_softmax(-1).gather(2, ids[:, -20:, None])[..., 0]
    expected = losses.mean(1).tolist()
    assert [sample["score"] for sample in record["samples"]] == pytest.approx(expected, abs=1e-3)
    (cell,) = results.cells([record])
    assert cell["value"] == pytest.approx(math.exp(sum(expected) / 3), rel=1e-3)
    assert [place for place, _ in cell["curve"]] == list(range(580, 600))


def test_cells_by_hand(tmp_path):
    usage = {"tokens_attended": 1.0, "kv_bytes_read": 2.0, "kv_bytes_held": 3.0, "kv_bytes_dense": 4.0}
    shared = {"task": "t", "metric": "accuracy", "length": 8, "policy": "quest", "label": "Quest", "budget": 64}
    shared |= {"usage": usage, "seconds": 1.0}
    samples = [{"index": i, "score": float(i != 2), "depth": 0.5 if i < 2 else 0.1} for i in range(3)]
    records = [shared | {"samples": samples[:1]}, shared | {"samples": samples}]
    (cell,) = results.cells(records)
    assert cell["value"] == pytest.approx(2 / 3)
    assert cell["error"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert cell["tries"] == 3
    assert cell["depths"] == [(0.1, 0.0, 1), (0.5, 1.0, 2)]
    results.write(tmp_path, SETTINGS, [cell])
    assert json.loads((tmp_path / "results.json").read_text())["settings"] == SETTINGS
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert float(row["value"]) == cell["value"]
    assert row["budget"] == "64"
