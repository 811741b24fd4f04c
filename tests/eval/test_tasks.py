"""Tasks: prompts of the wanted length with the answer where it should be, scores worked out by hand, local data."""

import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter

import pytest

pytest.importorskip("transformers", minversion="5.0")
datasets = pytest.importorskip("datasets")
pytest.importorskip("rouge")

from quest_eval import tasks
from quest_eval.errors import InputError
from quest_eval.models import ByteTokenizer
from quest_eval.tasks import metrics
from quest_eval.tasks.text import Text, insert, read_text

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def text():
    return read_text(None, BYTES)


def make(name, text=None, **options):
    return tasks.make(name, tasks.Setup(BYTES, text, **{"tries": 3, **options}))


def decoded(sample):
    return BYTES.decode(sample.ids)


def test_pieces_go_to_line_ends_near_their_depth():
    text = Text("ab\n" * 100, BYTES, "lines")
    window = (text.tokens, text.line_starts)
    ids, begins = insert(window, [(0.5, [1, 1]), (0.1, [2])])
    assert ids[begins[0] : begins[0] + 2] == [1, 1]
    assert begins[1] == 30
    assert begins[0] == 151
    assert [token for token in ids if token > 2] == text.tokens


@pytest.mark.parametrize("name", tasks.NEEDS_TEXT)
@pytest.mark.parametrize("length", [2000, 9000])
def test_prompt_and_answer_have_the_wanted_length(name, length, text):
    task = make(name, text)
    samples = task.samples(length)
    assert {len(sample.ids) + task.answer_tokens for sample in samples} == {length}
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert len({tuple(sample.ids) for sample in samples}) == 3
    assert samples == make(name, text).samples(length)
    assert samples != make(name, text, seed=1).samples(length)


def test_the_needle_asked_for_is_at_its_depth_among_others(text):
    for i, sample in enumerate(make("needles", text, tries=4, depths=(0.25, 0.75)).samples(4000)):
        prompt = decoded(sample)
        assert prompt.count("\nThe pass key of ") == 9
        name = prompt[prompt.rindex(" of ") + 4 : prompt.rindex(" is ")]
        fact = f"\nThe pass key of {name} is {sample.references[0]}.\n"
        assert sample.depth == (0.25, 0.75)[i % 2]
        assert abs(prompt.index(fact) / 4000 - sample.depth) < 0.15
        assert decoded(sample)[-sample.tail :] == f"\nThe pass key of {name} is "
    assert make("passkey", text).score("12345", tasks.Sample(0, [], 1, ("12345",))) == 1
    assert make("passkey", text).score("12346", tasks.Sample(0, [], 1, ("12345",))) == 0


def test_a_chain_of_variables_is_in_order(text):
    task = make("variable-tracking", text)
    (sample, *_) = task.samples(3000)
    prompt, names = decoded(sample), sample.references
    value = prompt[prompt.rindex("value ") + 6 :][:5]
    places = [prompt.index(f"\nVAR {names[0]} = {value}.\n")]
    places += [prompt.index(f"\nVAR {b} = VAR {a}.\n") for a, b in itertools.pairwise(names)]
    assert places == sorted(places)
    assert task.score(" ".join(names[:2]).lower(), sample) == 2 / 5


@pytest.mark.parametrize(("length", "common", "others"), [(3000, 6, 1), (9000, 30, 3)])
def test_common_words_are_named_most_often(length, common, others, text):
    (sample, *_) = make("common-words", text).samples(length)
    listed = decoded(sample).rpartition("more often than others.\n")[2].partition("\nQuestion")[0].split()
    assert listed[::2] == [f"{i}." for i in range(1, len(listed) // 2 + 1)]
    counts = Counter(listed[1::2])
    assert {word for word, count in counts.items() if count == common} == set(sample.references)
    assert set(counts.values()) == {common, others}
    assert len(sample.references) == 10


def test_perplexity_scores_the_end_of_a_text(text):
    assert {sample.tail for sample in make("perplexity", text, scored=100).samples(1000)} == {100}
    assert {sample.tail for sample in make("perplexity", text, scored=9999).samples(1000)} == {999}


def test_metrics_by_hand():
    assert metrics.f1("The cat, sat!", "a cat sat down") == 2 * 2 / (2 + 3)
    assert metrics.f1("dog dog", "dog") == 2 * 1 / 3
    assert metrics.f1("", "dog") == 0
    assert metrics.share_found("APPLE pear", ["apple", "plum"]) == 0.5
    # The longest common subsequence of 5 and 4 words has 4.
    assert metrics.rouge_l("the cat sat on mats", "the cat sat mats") == pytest.approx(2 * 4 / 9, abs=1e-6)
    assert metrics.rouge_l("", "a summary") == 0


HASHED = """
import hashlib
from quest_eval import tasks
from quest_eval.models import ByteTokenizer
from quest_eval.tasks.text import read_text
setup = tasks.Setup(ByteTokenizer(), read_text(None, ByteTokenizer()), tries=2)
for name in tasks.NEEDS_TEXT:
    print(hashlib.sha256(repr(tasks.make(name, setup).samples(3000)).encode()).hexdigest())
"""


def test_prompts_do_not_depend_on_the_hash_seed():
    runs = [
        subprocess.check_output([sys.executable, "-c", HASHED], env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2")
    ]
    assert runs[0].count("\n") == 6
    assert runs[0] == runs[1]


# LongBench and PG19

ROW = {
    "input": "Who wrote {it}?",
    "context": "Ann wrote it. " * 200,
    "answers": ["Ann", "Ann Smith"],
    "length": 600,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}


@pytest.mark.parametrize("place", ["qasper.jsonl", "data/qasper.jsonl", "data.zip"])
def test_longbench_from_a_folder(place, tmp_path):
    content = "".join(json.dumps(ROW | {"_id": str(i)}) + "\n" for i in range(4))
    if place == "data.zip":
        with zipfile.ZipFile(tmp_path / place, "w") as archive:
            archive.writestr("data/qasper.jsonl", content)
    else:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(content)
    task = make("qasper", data=tmp_path)
    short, whole = task.samples(2000), task.samples(8000)
    assert len(short) == 3
    assert {len(sample.ids) for sample in short} == {2000 - task.answer_tokens}
    assert ROW["context"] in decoded(whole[0])
    assert decoded(short[0])[-short[0].tail :].endswith("Question: Who wrote {it}?\n\nAnswer:")
    assert decoded(short[0])[:50] == decoded(whole[0])[:50], "the middle is cut"
    assert task.score("it was ann smith", short[0]) == pytest.approx(2 * 2 / 6)
    with pytest.raises(InputError, match="--lengths must be at least [0-9]+ for try 0 of qasper, got 300"):
        task.samples(300)


@pytest.mark.parametrize("name", ["gov_report", "triviaqa"])
def test_each_data_set_is_scored_in_its_way(name, tmp_path):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW | {"dataset": name}) + "\n")
    task = make(name, data=tmp_path)
    (sample,) = task.samples(8000)
    if name == "triviaqa":
        assert task.score("\nAnn\nand more", sample) == 1
    else:
        assert task.metric == "ROUGE-L"
        assert task.score("Ann Jones Smith", sample) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("place", [".", "test"])
def test_pg19_from_a_folder(place, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    for name, line in (("1.txt", "first book\n"), ("2.txt", "second book\n\n"), ("3.txt", "short")):
        (tmp_path / place / name).write_text(line * (1 if line == "short" else 300))
    task = make("pg19", data=tmp_path, scored=50)
    assert [decoded(sample)[:6] for sample in task.samples(1000)] == ["first ", "second"]
    with pytest.raises(InputError, match="pg19's books have up to 3900 tokens where 9000 are needed"):
        task.samples(9000)


@pytest.mark.parametrize(("name", "what"), [("qasper", "LongBench's qasper"), ("pg19", "PG19's test books")])
def test_what_is_not_there_offline_is_one_sentence(name, what, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=rf"^{what} cannot be had \(no network\): give a folder .* as --data$"):
        make(name).samples(1000)


@pytest.mark.parametrize("name", ["qasper", "pg19"])
def test_an_empty_folder_is_an_error(name, tmp_path):
    with pytest.raises(InputError, match=r"--data .* must have .* in it|--data .* must have books"):
        make(name, data=tmp_path).samples(1000)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("needles", 1000, "--lengths must be at least 1024 for 8 facts, got 1000"),
        ("passkey", 6000, r"the text \(short\) has 5000 tokens where [0-9]+ are needed: give a longer --text"),
        ("variable-tracking", 300, "--lengths must be at least about [0-9]+ for variable-tracking, got 300"),
        ("common-words", 4000, r"the text \(short\) has too few words for common-words: give another --text"),
    ],
)
def test_what_cannot_be_made_is_an_error(name, length, message):
    with pytest.raises(InputError, match=message):
        make(name, Text("some text\n" * 500, BYTES, "short")).samples(length)
