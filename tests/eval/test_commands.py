"""`quest-eval run` and `advise`: files, tables, other models, and errors of bad input."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_eval import command_line, models, tasks
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


def save(model, folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(BPE({token: i for i, token in enumerate([*alphabet, "<end>"])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    config = MistralConfig(**SIZES, sliding_window=32)
    return save(MistralForCausalLM(config), tmp_path_factory.mktemp("mistral"))


def test_the_help_names_all_tasks(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["run", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(tasks.NAMES) <= set(words)


def test_an_evaluation_writes_tables_and_pictures(tmp_path, capsys):
    arguments = "run passkey perplexity --lengths 600 900 --tries 2 --scored 8 --budgets 64 128 --policies dense quest"
    out = tmp_path / "out"
    assert command_line.main([*arguments.split(), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "passkey, 600 tokens: accuracy (2 tries)" in printed
    assert "Quest, max" in printed
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert len(cells) == 2 * 2 * 3
    names = {"passkey-budget", "passkey-depth", "perplexity-budget", "perplexity-position", "recall", "pages"}
    assert {path.stem for path in out.glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in out.glob("*.png"))


def test_another_model_with_a_tokenizer_of_its_own(llama, tmp_path):
    arguments = f"run needles --model {llama} --lengths 1100 --tries 2 --budgets 64 --policies dense quest h2o"
    assert command_line.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert {cell["tries"] for cell in cells} == {2}


def test_a_chat_template_goes_around_the_prompt(llama):
    tokenizer = models.find(llama).tokenizer
    tokenizer._tokenizer.chat_template = "<user>{{ messages[0]['content'] }}</user><model>"
    before, behind = tokenizer.frame(chat=True)
    assert (tokenizer.decode(before), tokenizer.decode(behind)) == ("<user>", "</user><model>")


def test_advice_is_a_budget_that_keeps_the_target(tmp_path, capsys):
    arguments = "advise --length 600 --tokens 4 --budgets 64 128 608 --target 0.999 --out"
    assert command_line.main([*arguments.split(), str(tmp_path)]) == 0
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert advice["recommended_budget"] == 608
    masses = [row["weakest_layer"] for row in advice["budgets"]]
    assert masses == sorted(masses)
    assert masses[0] < 0.999
    assert masses[2] == pytest.approx(1, abs=1e-5)
    assert advice["budgets"][2]["perplexity"] == pytest.approx(advice["dense_perplexity"], rel=1e-4)
    assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG")
    assert "Recommended budget: 608 tokens" in " ".join(capsys.readouterr().out.split())


def test_no_budget_is_enough(tmp_path, capsys):
    arguments = "advise --length 600 --tokens 2 --budgets 32 --target 1 --out"
    assert command_line.main([*arguments.split(), str(tmp_path)]) == 0
    assert json.loads((tmp_path / "advice.json").read_text())["recommended_budget"] is None
    assert "No budget keeps 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run passkey --chat", "the bundled model has no chat template: leave --chat away"),
        ("run passkey --lengths 40000", "--lengths must be at most 32768, which the model knows, got 40000"),
        ("run passkey --policies nonsense", "--policies and --budgets: policy must be one of dense"),
        ("run passkey --budgets 100", "--budgets must be multiples of the page size, 16, from 32 on, got 100"),
        ("run passkey --text none", "--text none cannot be read: No such file"),
        ("run passkey --tries 0", "--tries must be at least 1, got 0"),
        ("run passkey --depths 2", "--depths must be from 0 to 1, got 2.0"),
        ("run qasper --data none", "--data none must have qasper.jsonl, data/qasper.jsonl or data.zip in it"),
        ("run needles --lengths 500", "--lengths must be at least 1024 for 8 facts, got 500"),
        ("run passkey --out file", "--out file cannot be written"),
        ("run passkey --model /none", "--model /none cannot be had ("),
        ("advise --target 2", "--target must be above 0 and at most 1, got 2.0"),
        ("advise --policy dense", "--policy dense has no budget to advise on"),
    ],
)
def test_bad_input_is_one_sentence_before_long_work(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded first"))
    assert command_line.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("quest-eval: " + message)
    assert error.count("\n") == 1


def test_models_that_cannot_be_evaluated_are_refused(llama, sliding, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded first"))
    assert command_line.main(["run", "passkey", "--model", sliding]) == 2
    assert "it has sliding_window): choose one with plain attention" in capsys.readouterr().err
    assert command_line.main(["run", "passkey", "--model", llama, "--chat"]) == 2
    assert "has no chat template: leave --chat away" in capsys.readouterr().err
