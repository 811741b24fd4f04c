"""Prefills on disk: the bits of a fresh one, keyed by all that decides them, safe against files that are cut off."""

import copy
import os
import time

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import make_model, prompt
from quest_eval import models
from quest_eval.decoding import attention_function
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.decoding.prefill_store import PrefillStore
from quest_eval.policies import make

CONTEXT = 100
POLICIES = [make(name, 32) for name in ("dense", "quest", "h2o", "snapkv", "streaming")]
TENSORS = {"x": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def forwards(monkeypatch):
    """The lengths of the forward passes that read contexts."""
    seen, forward = [], attention_function.forward

    def noted(model, attention, ids, start):
        if ids.shape[1] > 1:
            seen.append(ids.shape[1])
        return forward(model, attention, ids, start)

    monkeypatch.setattr(attention_function, "forward", noted)
    return seen


def decoder(model, store, rows=2, **options):
    fingerprint = models.fingerprint(model)
    return PolicyDecoder(model, max_tokens=120, batch_size=rows, store=store, fingerprint=fingerprint, **options)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_is_read_back_gives_the_same_bits(device, kind, tmp_path, forwards):
    model, ids = make_model(kind, device), prompt(105, device, 1, (0, 0))["input_ids"]
    store, told = PrefillStore(tmp_path / "prefills", 2**30), []
    scores = []
    for _ in range(2):
        one = decoder(model, store)
        one.prefill(ids[:, :CONTEXT], policies=POLICIES, chunk=40, progress=told.append)
        scores.append([one.score(policy, ids[:, CONTEXT:]) for policy in POLICIES])
    fresh = PolicyDecoder(model, max_tokens=120, batch_size=2)
    fresh.prefill(ids[:, :CONTEXT], policies=POLICIES, chunk=40)
    scores.append([fresh.score(policy, ids[:, CONTEXT:]) for policy in POLICIES])
    assert forwards == [40, 40, 20] * 4, "the second prefill comes from the disk"
    assert sum(told) == 2 * 2 * CONTEXT
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*scores, strict=True))


def test_another_batch_or_order_finds_its_contexts(tmp_path, forwards):
    model, ids = make_model(), prompt(CONTEXT, "cpu", 1, (0, 0, 0))["input_ids"]
    store = PrefillStore(tmp_path, 2**30)
    decoder(model, store, 3).prefill(ids, policies=POLICIES)
    decoder(model, store, 2).prefill(ids[[2, 0]], policies=POLICIES)
    assert len(forwards) == 3


def test_what_decides_the_bits_is_part_of_the_key(tmp_path, forwards):
    model, ids = make_model(), prompt(CONTEXT, "cpu", 1, (0,))["input_ids"]
    store = PrefillStore(tmp_path, 2**30)

    def read(model=model, ids=ids, policies=POLICIES, **options):
        forwards.clear()
        decoder(model, store, 1).prefill(ids, policies=policies, **options)
        return bool(forwards)

    assert read() and not read()
    assert read(ids=ids[:, :-1])
    assert read(ids=ids.flip(1))
    assert read(policies=POLICIES[:2]), "column sums are noted for H2O alone"
    assert read(chunk=50)
    assert read(model=make_model("llama"))
    assert read(model=copy.deepcopy(model).to(torch.bfloat16))
    assert not read()


def test_a_file_that_is_cut_off_is_read_anew(tmp_path, forwards):
    model, ids = make_model(), prompt(CONTEXT, "cpu", 1, (0,))["input_ids"]
    store = PrefillStore(tmp_path, 2**30)
    decoder(model, store).prefill(ids, policies=POLICIES)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2):
        path.write_bytes(whole[:size])
        forwards.clear()
        decoder(model, store).prefill(ids, policies=POLICIES)
        assert len(forwards) == 1
        assert path.stat().st_size == len(whole), "it is whole again"


def test_a_failed_write_leaves_nothing_and_is_no_error(tmp_path, monkeypatch):
    store = PrefillStore(tmp_path, 2**30)
    with monkeypatch.context() as changed:
        changed.setattr(
            "quest_eval.decoding.prefill_store.save_file", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        store.save({"a": 1}, TENSORS, {})
    assert list(tmp_path.iterdir()) == []
    assert store.load({"a": 1}) is None


def test_the_least_recently_used_make_room(tmp_path):
    store = PrefillStore(tmp_path, 3000)
    big = {"x": torch.zeros(200)}  # 800 bytes and a header
    for name in "abc":
        store.save({"name": name}, big, {"name": name})
        time.sleep(0.02)
    assert store.load({"name": "a"})[1] == {"name": "a"}
    time.sleep(0.02)
    store.save({"name": "d"}, big, {})
    assert [store.load({"name": name}) is not None for name in "abcd"] == [True, False, True, True]
    store.save({"name": "e"}, {"x": torch.zeros(1000)}, {})
    assert store.load({"name": "e"}) is None, "larger than the whole store"
    assert store.load({"name": "d"}) is not None


def test_files_of_processes_that_died_are_deleted(tmp_path):
    old, new = tmp_path / "old.unfinished", tmp_path / "new.unfinished"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    PrefillStore(tmp_path, 2**30).save({}, TENSORS, {})
    assert not old.exists() and new.exists()


def test_fingerprints_tell_models_apart_and_nothing_else(tmp_path):
    model = copy.deepcopy(make_model())
    mark = models.fingerprint(model)
    model.set_attn_implementation("sdpa")
    assert models.fingerprint(model) == mark
    model.save_pretrained(tmp_path)
    assert models.fingerprint(type(model).from_pretrained(tmp_path)) == mark
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    assert models.fingerprint(model) != mark


def test_a_store_needs_a_fingerprint(tmp_path):
    with pytest.raises(ValueError, match="a store of prefills needs the model's fingerprint"):
        PolicyDecoder(make_model(), max_tokens=8, store=PrefillStore(tmp_path, 1))
