"""Real text: the loss of genres relative to dense, facts in the model's own words, and fields of policies by name."""

import dataclasses
import json
import math
import re

import pytest

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_eval import command_line, tasks
from quest_eval.errors import InputError
from quest_eval.models import ByteTokenizer
from quest_eval.policies import make
from quest_eval.policies.quest import Quest
from quest_eval.results import cells as results
from quest_eval.results.tables import markdown, tables
from quest_eval.tasks import genres
from quest_eval.tasks.hidden_facts import TEMPLATES
from quest_eval.tasks.text import read_text
from quest_ops import QuestConfig
from rich.console import Console

TOKENIZER = ByteTokenizer()


# Genres


def test_genres_are_long_real_and_unlike_each_other():
    texts = {name: genres.read(name) for name in genres.NAMES}
    assert all(len(text) > 4 * 7700 for text in texts.values()), "7,700 tokens of about four bytes"
    assert all(genres.read(name) == text for name, text in texts.items()), "the same each time"
    starts = {text[:200] for text in texts.values()}
    assert len(starts) == len(genres.NAMES)
    assert "def " in texts["code"] and "\ndef " not in texts["docstrings"][:5000]
    assert 'The "if" statement' in texts["manual"]
    assert "WITHOUT WARRANTIES" in texts["licences"].upper()
    assert "PyTorch" in texts["readmes"]


def test_tries_take_the_genres_in_turn_and_depend_on_the_seed_alone():
    setup = tasks.Setup(TOKENIZER, tries=4, scored=16, genres=("manual", "code"))
    samples = tasks.make("loss", setup).samples(500)
    assert [sample.genre for sample in samples] == ["manual", "code"] * 2
    assert all((len(sample.ids), sample.tail) == (500, 16) for sample in samples)
    assert samples == tasks.make("loss", setup).samples(500)
    assert samples[0].ids != samples[2].ids
    other = dataclasses.replace(setup, seed=1)
    assert tasks.make("loss", other).samples(500)[0].ids != samples[0].ids


def record(policy, budget, losses):
    samples = [{"index": i, "score": loss, "genre": "ab"[i % 2], "curve": []} for i, loss in enumerate(losses)]
    usage = dict.fromkeys(("tokens_attended", "kv_bytes_read", "kv_bytes_held", "kv_bytes_dense"), 1.0)
    cell = {"task": "loss", "metric": "perplexity over dense", "length": 8, "policy": policy, "label": policy}
    return cell | {"budget": budget, "samples": samples, "usage": usage, "seconds": 1.0}


def test_perplexity_over_dense_by_hand():
    dense, sparse = results.cells([record("dense", None, [1.0, 2.0, 3.0]), record("quest", 64, [1.5, 2.2, 3.1])])
    assert dense["value"] == 1 and dense["error"] == 0
    assert dense["perplexity"] == pytest.approx({"all": math.exp(2), "a": math.exp(2), "b": math.exp(2)})
    assert sparse["value"] == pytest.approx(math.exp(0.8 / 3))
    assert sparse["genres"] == pytest.approx({"a": math.exp(0.3), "b": math.exp(0.2)})
    assert sparse["error"] == pytest.approx(sparse["value"] * math.sqrt(0.13 / 3) / math.sqrt(3) * 1, rel=0.05)
    assert "| quest | 1.31 |" in markdown([dense, sparse])
    console = Console(width=80, record=True)
    for table in tables([dense, sparse]):
        console.print(table)
    assert "by genre" in console.export_text()


def test_the_loss_needs_dense(capsys):
    assert command_line.main(["run", "loss", "--policies", "quest"]) == 2
    assert "task loss compares with dense attention: add dense to --policies" in capsys.readouterr().err


def test_a_whole_budget_has_the_loss_of_dense(tmp_path):
    arguments = "run loss --lengths 600 --tries 2 --scored 8 --budgets 64 608 --policies dense quest,sink_pages=1"
    assert command_line.main([*arguments.split(), "--genres", "code", "manual", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["settings"]["genres"]) == {"code", "manual"}
    values = {cell["budget"]: cell["value"] for cell in found["cells"]}
    assert values[None] == 1
    assert values[608] == pytest.approx(1, abs=1e-3)
    assert values[64] != pytest.approx(1, abs=1e-3)


def test_a_genre_that_is_too_short_is_named():
    with pytest.raises(InputError, match=r"the text \(readmes\) has .* tokens where 10000000 are needed"):
        tasks.make("loss", tasks.Setup(TOKENIZER, tries=1, genres=("readmes",))).samples(10_000_000)
    with pytest.raises(InputError, match="--genres must be of code, docstrings, .*, got songs"):
        tasks.make("loss", tasks.Setup(TOKENIZER, genres=("songs",)))


# Facts


class ChatTokenizer(ByteTokenizer):
    chats = True

    def frame(self, chat):
        return (self.encode("<user>"), self.encode("</user><model>")) if chat else ([], [])


@pytest.fixture(scope="module")
def text():
    return read_text(None, TOKENIZER)


def test_a_fact_is_hidden_at_its_depth_and_asked_for_at_the_end(text):
    setup = tasks.Setup(ChatTokenizer(), text, tries=20, depths=(0.1, 0.5, 0.9))
    task = tasks.make("facts", setup)
    samples = task.samples(3000)
    for sample in samples:
        prompt = bytes(sample.ids).decode(errors="replace")
        (answer,) = sample.references
        assert len(sample.ids) == 3000 - task.answer_tokens
        place = re.search(rf" {answer}(\.\n| of the hotel)", prompt).start()
        assert place / len(prompt) == pytest.approx(sample.depth, abs=0.12)
        question = bytes(sample.ids[-sample.tail :]).decode()
        assert question.endswith("? Answer in one sentence.</user><model>")
        assert answer not in question
        assert prompt.startswith("<user>")
    assert {sample.depth for sample in samples} == {0.1, 0.5, 0.9}
    assert len({sample.references for sample in samples}) > 10
    assert samples == task.samples(3000)


def test_without_a_template_the_question_is_plain(text):
    (sample,) = tasks.make("facts", tasks.Setup(TOKENIZER, text, tries=1)).samples(3000)
    assert bytes(sample.ids[-sample.tail :]).decode().startswith("\n\nQuestion: ")
    assert bytes(sample.ids).decode(errors="replace").endswith("?\nAnswer:")


def test_an_answer_is_right_if_it_has_the_key(text):
    task = tasks.make("facts", tasks.Setup(TOKENIZER, text, tries=1))
    sample = dataclasses.replace(task.samples(3000)[0], references=("lantern",))
    assert task.score("It is under the Lantern.", sample) == 1
    assert task.score("It is under the carpet.", sample) == 0


def test_templates_do_not_give_the_answer_away():
    for template in TEMPLATES:
        assert "{answer}" in template.sentence and "{answer}" not in template.question
        assert len(set(template.answers)) == len(template.answers)


# Fields of policies


def test_every_field_of_the_configuration_can_be_set():
    ours, theirs = ({field.name: field for field in dataclasses.fields(kind)} for kind in (Quest, QuestConfig))
    del theirs["selector"]  # a function: a selection of one's own is a policy of one's own
    assert set(theirs) <= set(ours)
    name = "quest,page_size=8,sink_pages=1,recent_pages=2,dense_layers=0,group_reduce=soft,bounds=int8,std_factor=0.5"
    policy = make(name, 64, page_size=16)
    assert QuestConfig(**{field: getattr(policy, field) for field in theirs}) == QuestConfig(
        64, 8, 1, 2, 0, "soft", "int8", 0.5
    )
    assert policy.name == name
    assert policy.label() == "Quest, soft, mean ± 0.5 std, int8, pages of 8, sink 1, recent 2, no dense layers"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quest,sinks=1", "'sinks=1' in quest,sinks=1 must be field=value with a field of page_size, .*, bounds"),
        ("quest,sink_pages=one", r"sink_pages in .* must be a number \(int\), got 'one'"),
        ("quest,sink_pages=-1", "sink_pages must be at least 0, got -1"),
        ("quest,sink_pages=4", "sink_pages \\+ recent_pages must be at most the 4 pages of the budget"),
        ("page-oracle,sink_pages=4", "the budget of page-oracle,sink_pages=4 must be at least 80 tokens, got 64"),
        ("page-oracle,page_size=12", "page_size must be one of 4, 8, 16, 32, 64, 128, got 12"),
        ("quest,group_reduce=mean", "group_reduce in .* must be one of none, sum, max, soft|must be one of"),
        ("quest,shared=yes", "shared in .* must be one of true, false, got 'yes'"),
        ("quest,dense_layers=-1", "dense_layers must be at least 0, got -1"),
        ("sparq,rank=x", "rank in sparq,rank=x must be a number"),
        ("dense,budget=3", "'budget=3' in dense,budget=3 must be field=value"),
    ],
)
def test_fields_that_cannot_be_set_are_errors(name, message):
    with pytest.raises(ValueError, match=message):
        make(name, 64)


def test_fields_of_other_policies():
    assert make("sparq,rank=4", 64).rank == 4
    assert make("sparq,rank=none", 64).rank is None
    assert make("quest-head,shared=true", 64).shared is True
    assert make("window,sink_pages=2", 64).label() == "window, sink 2"


def test_budgets_go_with_the_page_size_of_the_policy(capsys):
    assert command_line.main(["run", "passkey", "--policies", "quest,page_size=64", "--budgets", "96"]) == 2
    error = capsys.readouterr().err
    assert "--budgets must be multiples of the page size, 64 of quest,page_size=64, got 96" in error


# Tables


def test_advice_of_a_policy_with_fields_fits_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = "advise --policy quest-int8,sink_pages=1 --length 600 --tokens 2 --out"
    assert command_line.main([*arguments.split(), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("…" in line for line in lines)
    assert [line.split()[:2] for line in lines if "layer " in line][:6] == [["layer", f"{i}"] for i in range(6)]
    rows = ("layer", "budget", "weakest", "perplexity")
    table = [line for line in lines if line.startswith(" ") and line.lstrip().startswith(rows)]  # prose is not indented
    assert len(table) >= 9
    assert max(map(len, table)) <= 80
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert advice["policy"] == "quest-int8,sink_pages=1"
