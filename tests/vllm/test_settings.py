"""The settings of Quest in an engine: both ways to give them, and one sentence for each that cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quest_ops import QuestConfig
from quest_ops.vllm.settings import RefusedError, Settings, parse


@pytest.mark.parametrize("off", ["", "0", "  "])
def test_off(off: str) -> None:
    assert parse(off) is None


def test_the_two_ways_are_one() -> None:
    pairs = parse("budget=2048, dense_layers=3,group_reduce=sum,report=2.5")
    assert pairs == {"budget": 2048, "dense_layers": 3, "group_reduce": "sum", "report": 2.5}
    assert parse(json.dumps(pairs)) == pairs
    settings = Settings.of(pairs, 32, 4)
    assert settings.config == QuestConfig(budget=2048, page_size=32, dense_layers=3, group_reduce="sum")
    assert (settings.budgets, settings.report) == ((2048,) * 4, 2.5)


def test_no_key_gives_the_defaults_of_quest_config() -> None:
    assert Settings.of({}, 16, 2) == Settings(QuestConfig(), (2048, 2048), None)


@pytest.mark.parametrize(
    "keys",
    [{"budget": [512, 256, 64]}, {"budget": [None, 0, 64]}, {"budget": 64, "report": 0, "bounds": "cache"}, {}],
)
def test_keys_make_the_same_settings_again(keys: dict[str, object]) -> None:
    settings = Settings.of(keys, 32, 3)
    assert Settings.of(json.loads(json.dumps(settings.keys)), 32, 3) == settings
    layers = [0 if settings.config.at(i).dense_layers == 3 else settings.config.at(i).budget for i in range(3)]
    assert tuple(layers) == settings.budgets


def test_a_saved_configuration_is_taken_but_for_the_keys_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    QuestConfig([0, 64, 256], 32, group_reduce="sum", dense_below=96).save(path, model="a/b")
    settings = Settings.of({"config": str(path), "bounds": "int8", "report": 0}, 32, 3)
    assert settings.config == QuestConfig([0, 64, 256], 32, group_reduce="sum", dense_below=96, bounds="int8")
    assert (settings.budgets, settings.report) == ((0, 64, 256), 0)
    path.unlink()  # another process needs no file
    assert Settings.of(json.loads(json.dumps(settings.keys)), 32, 3) == settings
    assert parse(f"config={path}") == {"config": str(path)}


def test_a_saved_configuration_that_does_not_go_with_the_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    QuestConfig([0, 64, 256], 32).save(path, model="a/b")
    for num_layers, block_size, sentence in (
        (28, 32, "config.json was made for the model 'a/b' of 3 layers, got 28"),
        (3, 16, "page_size must be the engine's block size, 16, got 32"),
    ):
        with pytest.raises(RefusedError, match=sentence):
            Settings.of({"config": str(path)}, block_size, num_layers)
    with pytest.raises(RefusedError, match="No such file"):
        Settings.of({"config": str(tmp_path / "none.json")}, 32, 3)


@pytest.mark.parametrize(
    ("keys", "block_size", "sentence"),
    [
        ({"budgets": 64}, 32, "quest_ops has no setting 'budgets': it takes budget"),
        ({"selector": print}, 32, "quest_ops has no setting 'selector'"),
        ({"budget": 200}, 128, "budget must be a multiple of the block size, 128, got 200"),
        ({"budget": 0}, 32, "budget must be a multiple of the block size, 32, got 0"),
        ({"budget": "2k"}, 32, "budget must be a multiple of the block size, 32, got '2k'"),
        ({"budget": True}, 32, "budget must be a multiple of the block size, 32, got True"),
        ({"budget": [64, 64]}, 32, "a list of budgets must have one for each of 3 layers, got 2"),
        ({"budget": [64, 64, 80]}, 32, "budget must be a multiple of the block size, 32, got 80"),
        ({"budget": [64, 64, -32]}, 32, "budget must be a multiple of the block size, 32, got -32"),
        ({"budget": [64, 0, 64], "dense_layers": 2}, 32, "dense_layers must be 0 or left out with a list of budgets"),
        ({"budget": [512, 512, 32], "sink_pages": 1}, 32, "sink_pages + recent_pages must be at most the 1 pages"),
        ({"page_size": 16}, 128, "page_size must be the engine's block size, 128, got 16: leave it out, or start"),
        ({}, 48, "quest_ops takes blocks of 4, 8, 16, 32, 64, 128 tokens, got 48"),
        ({"group_reduce": "mean"}, 32, "group_reduce must be one of"),
        ({"dense_layers": "two"}, 32, "quest_ops: "),
        ({"recent_pages": 0}, 32, "recent_pages must be at least 1 in an engine, got 0"),
        ({"candidates": 64}, 32, "candidates must be 0 or pages more than the budget, 2048, got 64"),
        ({"candidates": 4096}, 32, "candidates must be 0 in an engine, whose blocks have no room for codes, got 4096"),
        (
            {"reselect_every": 4},
            32,
            "reselect_every must be 1 in an engine, whose requests change places between steps, got 4",
        ),
        ({"report": -1}, 32, "report must be seconds, at least 0, got -1"),
        ({"report": "often"}, 32, "report must be seconds, at least 0, got 'often'"),
    ],
)
def test_refusals(keys: dict[str, object], block_size: int, sentence: str) -> None:
    with pytest.raises(RefusedError) as error:
        Settings.of(keys, block_size, 3)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["on", "budget", "budget=", "2048", "{budget"])
def test_text_that_is_neither_pairs_nor_json(text: str) -> None:
    with pytest.raises(RefusedError, match="QUEST_OPS_VLLM"):
        parse(text)


def test_importing_quest_ops_does_not_import_vllm() -> None:
    program = "import sys, quest_ops, quest_ops.vllm, quest_ops.vllm.plugin; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
