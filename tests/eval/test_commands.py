"""`quest-eval run` and `advise`: files, tables, other models, and errors of bad input."""

import dataclasses
import importlib
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from helpers.checkpoint import SIZES, save
from quest_eval import command_line, models, policies, tasks
from quest_eval.commands import advise as advise_command
from quest_eval.commands import measurements
from quest_ops import QuestConfig
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)


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


@pytest.mark.parametrize("command", ["run", "advise", "demo"])
def test_the_help_names_all_policies_and_every_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        command_line.main([command, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name, description in policies.NAMES.items() if command != "demo" else ():
        assert f"{name} {' '.join(description.split())}" in words
    module = importlib.import_module(f"quest_eval.commands.{command}")
    for field in dataclasses.fields(module.Options):
        default = field.default
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        if default in (None, "", False, dataclasses.MISSING) or field.name in ("model", "genres"):
            continue
        assert f"({default})" in words, field.name


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


def advise(arguments, folder, capsys):
    """The content of advice.json, and the printed words on one line."""
    assert command_line.main(["advise", *arguments.split(), "--out", str(folder)]) == 0
    return json.loads((folder / "advice.json").read_text()), " ".join(capsys.readouterr().out.split())


def test_advice_is_a_budget_that_keeps_the_target(tmp_path, capsys):
    advice, words = advise("--length 600 --tokens 4 --budgets 64 128 592 608 --target 0.98", tmp_path, capsys)
    masses = [row["weakest_layer"] for row in advice["budgets"]]
    assert masses == sorted(masses)
    assert masses[1] < 0.98 <= masses[2]
    assert advice["recommended_budget"] == 592
    assert not advice["recommends_dense"]
    assert "Recommended budget: 592 of 600 tokens, the smallest of these that keeps 98.0% of the attention's" in words
    assert masses[3] == pytest.approx(1, abs=1e-5)
    assert advice["budgets"][3]["perplexity"] == pytest.approx(advice["dense_perplexity"], rel=1e-4)
    assert advice["budgets"][3]["perplexity_over_dense_error"] == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_of_the_whole_text_is_called_dense(tmp_path, capsys):
    advice, words = advise("--length 600 --tokens 4 --budgets 64 128 608 --target 0.999", tmp_path, capsys)
    assert advice["recommended_budget"] == 608
    assert advice["recommends_dense"]
    assert "Recommended: dense attention. Only a budget that holds all 600 tokens keeps 99.9%" in words
    best = advice["budgets"][1]
    assert f"The largest below that, 128 tokens, keeps {best['weakest_layer']:.1%} in its weakest layer" in words


def test_perplexity_decides_where_it_is_asked_to(tmp_path, capsys):
    arguments = "--length 600 --tokens 8 --budgets 64 128 608 --criterion perplexity --target"
    advice, words = advise(f"{arguments} 100", tmp_path, capsys)
    assert advice["criterion"] == "perplexity"
    assert advice["recommended_budget"] == 64
    assert "the smallest of these that has at most 100 times dense attention's perplexity" in words
    ratios = [row["perplexity_over_dense"] for row in advice["budgets"]]
    target = (max(ratios[:2]) + 1) / 2
    advice, _ = advise(f"{arguments} {target}", tmp_path, capsys)
    assert advice["recommended_budget"] == (128 if ratios[1] <= target else 608)


def test_no_budget_is_enough(tmp_path, capsys):
    advice, words = advise("--length 600 --tokens 2 --budgets 32 --target 1", tmp_path, capsys)
    assert advice["recommended_budget"] is None
    (row,) = advice["budgets"]
    assert "No budget of these keeps 100.0% of the attention's weights" in words
    assert f"The largest, 32 tokens, keeps {row['weakest_layer']:.1%} in its weakest layer" in words
    assert f"perplexity is {abs(row['perplexity_over_dense'] - 1):.1%}" in words


def test_the_answer_by_the_other_criterion_is_told():
    row = {
        "budget": 64,
        "mass_by_layer": [1, 0.8],
        "perplexity_over_dense": 0.996,
        "perplexity_over_dense_error": 0.004,
    }
    advice = {"budgets": [row], "length": 600, "criterion": "mass", "target": 0.99, "dense_layers": 1}
    words = advise_command._advice(advice, {"mass": None, "perplexity": 64})
    assert "By --criterion perplexity the answer is 64 tokens, which keeps 80.0% in its weakest layer (1)" in words
    assert "its perplexity is 0.4% below dense attention's (standard error 0.4%)" in words
    assert "decode more" not in words
    row["perplexity_over_dense_error"] = 0.02
    assert "decode more --tokens for a sure answer" in advise_command._advice(advice, {"mass": None, "perplexity": 64})


LAYERS = "--length 600 --tokens 8 --budgets 32 64 128"


def test_a_budget_for_each_layer_is_written_as_a_configuration(tmp_path, capsys):
    advice, words = advise(f"{LAYERS} --keep 0.5 --evaluations 3", tmp_path / "out", capsys)
    config = QuestConfig.load(tmp_path / "out" / "config.json", model="bundled", num_layers=6)
    assert list(config.budget) == advice["layer_budgets"]
    assert replace(config, budget=2048, dense_layers=2) == QuestConfig()
    lists = [trial["budgets"] for trial in advice["trials"]]
    assert lists[:3] == [[budget] * 6 for budget in (32, 64, 128)]
    assert 0 < len(lists[3:]) <= 3
    within = [trial for trial in advice["trials"] if trial["loss"] <= 1.5]
    assert within == [trial for trial in advice["trials"] if trial["accepted"]]
    best = min(within, key=lambda trial: trial["bytes"])
    assert best["budgets"] == advice["layer_budgets"]
    assert best["bytes"] / sum(c[-1]["bytes"] for c in advice["choices"]) == advice["kv_bytes_over_dense"] < 1
    assert f"reads {advice['kv_bytes_over_dense']:.1%} of dense attention's bytes" in words
    assert f"{len(lists[3:])} lists were tried" in words


def test_the_written_configuration_is_a_policy_with_the_loss_of_the_advice(tmp_path, capsys):
    path = tmp_path / "sub" / "config.json"
    assert command_line.main(["advise", *LAYERS.split(), "--evaluations", "2", "--out", str(path)]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]
    capsys.readouterr()
    policy = policies.make(f"quest-config,file={path}", None)
    config = QuestConfig.load(path)
    assert [policy.is_dense(i) for i in range(6)] == [budget == 0 for budget in config.budget]
    assert [policy.at(i).limit for i in range(6) if config.budget[i]] == [n for n in config.budget if n]
    run = f"run perplexity --lengths 600 --tries 1 --scored 4 --policies dense quest-config,file={path}"
    assert command_line.main([*run.split(), "--out", str(tmp_path / "run")]) == 0
    _, cell = json.loads((tmp_path / "run" / "results.json").read_text())["cells"]
    assert cell["label"] == "Quest, config.json"
    share = cell["kv_bytes_read"] / cell["kv_bytes_dense"]
    assert (share < 1) == any(config.budget)


def test_the_saved_selection_is_the_policys(tmp_path):
    """Every field of a configuration reaches the policy of its layer."""
    path = tmp_path / "config.json"
    for changes in (
        {"reselect_every": 4},
        {"candidates": 256},
        {"dense_below": 64, "sink_pages": 0, "recent_pages": 2},
    ):
        config = QuestConfig([0, 64], group_reduce="sum", bounds="int8", std_factor=2.0, **changes)
        config.save(path)
        policy = policies.make(f"quest-config,file={path}", None).at(1)
        for field in dataclasses.fields(QuestConfig):
            if field.name not in ("budget", "dense_layers", "selector"):
                assert getattr(policy, field.name) == getattr(config, field.name), field.name
        assert policy.limit == 64


def test_a_margin_that_no_budget_keeps_gives_dense_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measurements.Measurements, "of", as_bad_as_can_be(measurements.Measurements.of))
    advice, words = advise(f"{LAYERS} --keep 0.01 --evaluations 3", tmp_path, capsys)
    assert QuestConfig.load(tmp_path / "config.json").budget == (0,) * 6
    assert (advice["kv_bytes_over_dense"], advice["best_single_budget"]) == (1.0, None)
    assert "No budget list was found with perplexity at most 1.0% above dense attention's" in words


def as_bad_as_can_be(of):
    return lambda *arguments, **options: dataclasses.replace(of(*arguments, **options), ratio=9.0)


def test_layers_of_a_sliding_model_that_have_a_window_get_no_budget(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "sliding_window": 32}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds, query_pre_attn_scalar=64))
    (tmp_path / "gemma3").mkdir()
    arguments = f"{LAYERS} --keep 9 --evaluations 2 --model {save(model, tmp_path / 'gemma3')}"
    advice, _ = advise(arguments, tmp_path / "out", capsys)
    assert advice["layer_budgets"] == [0, 32, 32]
    assert [len(choices) for choices in advice["choices"]] == [1, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("advise --keep 0", "--keep must be above 0, a share of dense attention's perplexity, got 0.0"),
        ("advise --keep 0.01 --evaluations 0", "--evaluations must be at least 1, got 0"),
        ("advise --keep 0.01 --policy h2o", "--policy h2o has no QuestConfig to write: name quest-default"),
        ("advise --keep 0.01 --policy quest-shared", "--policy quest-shared has no QuestConfig to write"),
        ("advise --keep 0.01 --length 60", "--budgets must have one below --length, 60"),
        ("run passkey --policies quest-config", "--policies and --budgets: policy quest-config needs a file"),
        (
            "run passkey --policies quest-config,file=none",
            "--policies and --budgets: file none cannot be read: No such",
        ),
        ("run passkey --policies quest-config,file=file", "--policies and --budgets: file is no JSON"),
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
        ("advise --target 2", "--target must be above 0 and at most 1 for mass, got 2.0"),
        ("advise --criterion perplexity --target 0.9", "--target must be at least 1 for perplexity, got 0.9"),
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
