"""The demo: facts hidden the same way each time, a run on a short text, and errors of bad input."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
Console = pytest.importorskip("rich.console").Console

from quest_eval import bundled_model
from quest_eval.commands import demo
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.errors import InputError
from quest_eval.policies import KVShape, make
from quest_eval.tasks import facts as needles
from quest_eval.tasks.text import standard_library_text

ROOT = Path(__file__).parents[2]


# Needles


def test_facts_are_hidden_where_they_say():
    text = standard_library_text(6000)
    haystack = needles.hide_facts(text, 6000, 5, seed=3)
    assert len(haystack.text) == 6000
    rest = haystack.text
    for i, fact in enumerate(haystack.facts):
        assert haystack.text[fact.start : fact.stop] == fact.line
        assert fact.line == f"\nThe pass key of {fact.name} is {fact.key}.\n".encode()
        assert i / 5 - 0.05 < fact.start / 6000 < (i + 1) / 5 + 0.05
        rest = rest.replace(fact.line, b"", 1)
    assert text.startswith(rest), "everything else is the text as it was"
    assert len({fact.name for fact in haystack.facts}) == 5


def test_the_seed_decides():
    text = standard_library_text(4000)
    first, again, other = (needles.hide_facts(text, 4000, 4, seed) for seed in (1, 1, 2))
    assert first == again
    assert {fact.key for fact in first.facts} != {fact.key for fact in other.facts}


def test_facts_stay_apart_in_a_text_without_line_ends():
    haystack = needles.hide_facts(b"x" * 2000, 2000, 8, seed=0)
    for fact in haystack.facts:
        assert haystack.text[fact.start : fact.stop] == fact.line


@pytest.mark.parametrize(
    ("text", "tokens", "count", "message"),
    [
        (b"x" * 500, 1000, 2, "the text has 500 bytes, one token each; 1000 tokens were asked for"),
        (b"x" * 500, 200, 2, "2 facts need a text of at least 256 tokens, got 200"),
        (b"x" * 500, 200, 0, "the number of facts must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_hidden_is_an_error(text, tokens, count, message):
    with pytest.raises(ValueError, match=message):
        needles.hide_facts(text, tokens, count, seed=0)


EXAMPLES = ROOT / "examples"
HASHED = """
import hashlib, sys
import numpy as np
from quest_eval.tasks import facts
from quest_eval.tasks.text import standard_library_text
sys.path.insert(0, sys.argv[1])
from retrieval_model import batches, corpus, documents, judge
text = standard_library_text(60000)
print(hashlib.sha256(repr(facts.hide_facts(text, 20000, 30, 0)).encode()).hexdigest())
text = np.frombuffer(text, np.uint8)
source = documents.Source(text, corpus.words_of(text))
for phase in "AB":
    batch = batches.make_batch(7, source, phase, 8192)
    print(hashlib.sha256(batch.inputs.numpy().tobytes() + batch.kinds.numpy().tobytes()).hexdigest())
print(hashlib.sha256(judge.question_documents(text, 1024, 8, 3).numpy().tobytes()).hexdigest())
"""


def test_texts_and_documents_do_not_depend_on_the_hash_seed():
    runs = [
        subprocess.run(
            [sys.executable, "-c", HASHED, str(EXAMPLES)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0].count("\n") == 4
    assert runs[0] == runs[1]


def test_training_refuses_lengths_that_do_not_hold_the_facts(tmp_path):
    """At once: there is no corpus to read, and nothing is written."""
    command = [sys.executable, str(EXAMPLES / "train_retrieval_model.py"), "--out", "model", "--lengths", "1024", "256"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.endswith("error: --lengths must be at least 358, to hold 8 facts and a question, got 256\n")
    assert run.stdout == ""
    assert not list(tmp_path.iterdir())


# Bytes read


def test_bytes_read_are_counted_as_the_operators_read_them():
    shape = KVShape(query_heads=8, kv_heads=2, head_dim=64, itemsize=2)
    dense, quest, window = (make(name, 64) for name in demo.COLUMNS)

    def share_read(policy, length):
        return policy.bytes_read(shape, length - 1, length) / (length * shape.token_bytes)

    assert share_read(dense, 1000) == 1
    # 1000 tokens are 63 pages, the last with 8 tokens: 3 full pages and that one, and the bounds of 63. Those are two
    # rows of half bytes and a float32, and a token is two rows of float16.
    bounds = (64 + 4) / (2 * 64 * 2)
    assert share_read(quest, 1000) == (3 * 16 + 8 + 63 * bounds) / 1000
    assert share_read(window, 1000) == (3 * 16 + 8) / 1000
    assert share_read(quest, 40) == (40 + 3 * bounds) / 40


# Asking


@pytest.fixture(scope="module")
def model():
    return bundled_model.load("cpu", torch.float32)


@pytest.fixture(scope="module")
def asked(model):
    """A decoder that has read a text, and the text's facts."""
    haystack = needles.hide_facts(standard_library_text(1200), 1200, 2, seed=0)
    decoder = PolicyDecoder(model, max_tokens=1300)
    told = []
    policies = [make(name, 64) for name in demo.COLUMNS]
    decoder.prefill(torch.tensor([list(haystack.text)]), policies=policies, chunk=500, progress=told.append)
    assert told == [500, 500, 200]
    return decoder, haystack.facts


def test_an_answer_leaves_the_text_as_it_was(asked):
    decoder, facts = asked
    first = demo.ask(decoder, make("quest-default", 64), facts[0])
    demo.ask(decoder, make("window", 64), facts[1])
    again = demo.ask(decoder, make("quest-default", 64), facts[0])
    assert again.text == first.text
    assert len(first.seconds) == len(facts[0].question) + needles.KEY_DIGITS - 1
    assert min(first.seconds) > 0


def test_a_dense_answer_is_transformers_own(model, asked):
    decoder, facts = asked
    text = needles.hide_facts(standard_library_text(1200), 1200, 2, seed=0).text
    ids = torch.tensor([list(text + facts[0].question)])
    model.set_attn_implementation("sdpa")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("quest_eval")
    assert bytes(out[0, -5:].tolist()).decode() == facts[0].key
    assert demo.ask(decoder, make("dense", None), facts[0]).right


def test_watching_notes_the_pages_of_the_answer(asked):
    decoder, facts = asked
    answer, pages = demo.watch(decoder, make("quest-default", 128), facts[1], 1200)
    assert sorted(pages.counts) == [2, 3, 4, 5], "layers 0 and 1 are dense"
    assert pages.length == 1200 + len(facts[1].question) + needles.KEY_DIGITS - 1
    counts = torch.stack([pages.counts[layer] for layer in sorted(pages.counts)])
    # 8 pages a head and step; in a step with a fresh page the last page is another.
    assert (counts.sum(-1) == 8 * needles.KEY_DIGITS).all()
    assert counts.max() <= needles.KEY_DIGITS
    assert decoder.observer is None
    assert answer.right
    fact_pages = range(facts[1].start // 16, facts[1].stop // 16 + 1)
    assert counts[:, :, fact_pages].max() > 0, "a right answer was read from somewhere"


# The demo itself


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=110, file=(folder / "log").open("w"))
    options = demo.Options(tokens=1500, facts=2, budgets=(64, 512), out=folder / "out")
    return demo.run(options, console), console.export_text(), folder / "out"


def test_the_dense_answers_are_all_right(short_run):
    results, _, _ = short_run
    dense = results["policies"][0]
    assert dense["name"] == "dense"
    assert dense["right"] == [True, True]
    assert dense["answers"] == [fact["key"] for fact in results["facts"]]
    assert dense["share_of_dense"] == 1


def test_all_policies_are_there(short_run):
    results, text, _ = short_run
    names = [(policy["name"], policy["budget"]) for policy in results["policies"]]
    assert names == [("dense", None), ("Quest", 64), ("Quest", 512), ("window", 64), ("window", 512)]
    everything = results["policies"][0]["kv_bytes_per_token"]
    assert everything == 2 * 1500 * 2 * 64 * 4
    for policy in results["policies"]:
        assert policy["exact_match"] == sum(policy["right"]) / 2
        assert policy["ms_per_token"] > 0
    for policy in results["policies"][1:]:
        assert policy["kv_bytes_per_token"] < everything
    assert "Dense attention itself" not in text
    for word in ("Quest", "window", "exact match", "ms a token", "sparse layers", results["facts"][0]["name"]):
        assert word in text


def test_picture_and_numbers_are_written(short_run):
    results, text, folder = short_run
    assert json.loads((folder / "results.json").read_text()) == results
    picture = (folder / "pages.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width >= 1000
    assert height >= 500
    from matplotlib import image

    pixels = image.imread(folder / "pages.png")[..., :3].reshape(-1, 3)
    assert len({tuple(pixel) for pixel in (pixels[:: len(pixels) // 20000] * 255).astype(int).tolist()}) > 5
    assert "pages.png" in text
    assert "results.json" in text


def test_a_text_that_the_model_does_not_know_is_said_to_be_one(tmp_path):
    text = tmp_path / "zeros"
    text.write_bytes(b"0" * 1200)
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    results = demo.run(demo.Options(text=text, facts=1, budgets=(64,), out=tmp_path), console)
    words = console.export_text()
    assert ", 1 fact hidden in them" in words
    assert results["policies"][0]["right"] == [False]
    assert "Dense attention itself finds 0 of 1: the bundled model does not know such a text." in words


def test_a_text_of_ones_own(tmp_path):
    lines = random.Random(0).choices(standard_library_text(20000).splitlines(), k=60)
    path = tmp_path / "text"
    path.write_bytes(b"\n".join(lines))
    haystack = demo.hide(demo.Options(text=path, facts=2))
    assert len(haystack.text) == path.stat().st_size
    assert hashlib.sha256(haystack.text).digest() != hashlib.sha256(path.read_bytes()).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, "8 facts need a text of at least 1024 tokens, got 100"),
        ({"tokens": 40000}, "--tokens must be at most 32768"),
        ({"text": Path("no such file")}, "--text no such file cannot be read: No such file"),
        ({"text": Path(__file__), "tokens": 32768}, "the text has [0-9]+ bytes"),
        ({"facts": 0}, "the number of facts must be at least 1"),
        ({"budgets": (100,)}, "--budgets must be multiples of the page size, 16, from 32 on, got 100"),
        ({"budgets": (16,)}, "--budgets must be multiples of the page size, 16, from 32 on, got 16"),
        ({"budgets": ()}, "--budgets must name at least one"),
        ({"out": Path(__file__)}, "--out .* cannot be made"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_loaded(changes, message, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled_model, "load", lambda *_: pytest.fail("the model was loaded first"))
    options = demo.Options(**{"out": tmp_path / "out", **changes})
    with pytest.raises(InputError, match=message):
        demo.run(options, Console(file=(tmp_path / "log").open("w")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_error(tmp_path):
    with pytest.raises(InputError, match="--device cuda is not possible: "):
        demo.run(demo.Options(device="cuda", out=tmp_path), Console(file=(tmp_path / "log").open("w")))
