"""A QuestConfig in a file: what is saved is loaded, and what a file may not hold is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from quest_ops import QuestConfig
from quest_ops.config_file import VERSION

# No field has its default, so that a field left out shows.
UNLIKE = QuestConfig(512, 32, 2, 3, 4, "sum", "cache", None, None, 999, 2048)
KEPT = QuestConfig(reselect_every=4)  # which does not go with candidates
LISTED = QuestConfig([0, 512, 64], 8, std_factor=2.0)


@pytest.mark.parametrize("config", [QuestConfig(), UNLIKE, KEPT, LISTED, replace(LISTED, std_factor=1)])
@pytest.mark.parametrize("about", [{}, {"model": "a/b"}, {"model": "a/b", "num_layers": 3}])
def test_a_saved_configuration_is_loaded(tmp_path: Path, config: QuestConfig, about: dict[str, Any]) -> None:
    config.save(tmp_path / "config.json", **about)
    assert QuestConfig.load(tmp_path / "config.json") == config
    assert QuestConfig.load(str(tmp_path / "config.json"), **about) == config
    assert QuestConfig.load(tmp_path / "config.json", model=about.get("model", "any")) == config


def test_every_field_but_the_selector_is_a_line(tmp_path: Path) -> None:
    LISTED.save(tmp_path / "config.json", model="a/b")
    text = (tmp_path / "config.json").read_text()
    content = json.loads(text)
    assert set(content) == {f.name for f in fields(QuestConfig)} - {"selector"} | {"version", "model", "num_layers"}
    assert (content["num_layers"], content["budget"]) == (3, [0, 512, 64])
    assert '  "budget": [0, 512, 64],\n' in text
    assert len(text.splitlines()) == len(content) + 2
    both = (UNLIKE, KEPT)
    changed = {f.name for f in fields(QuestConfig) if any(getattr(config, f.name) != f.default for config in both)}
    assert changed == {f.name for f in fields(QuestConfig)} - {"selector"}


def test_a_field_left_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"version": 1, "budget": [64, null]}')
    assert QuestConfig.load(tmp_path / "config.json") == QuestConfig([64, 0])


def test_a_selector_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    config = replace(LISTED, selector=lambda *_: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="a configuration with a selector cannot be saved, since a file holds no"):
        config.save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.budget must be .* one for each of 4 layers, got 3 of them"):
        LISTED.save(tmp_path / "config.json", num_layers=4)
    assert not list(tmp_path.iterdir())


def test_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    LISTED.save(path, model="a/b")
    with pytest.raises(ValueError, match=r"config.json was made for the model 'a/b', got 'c/d'"):
        QuestConfig.load(path, model="c/d")
    with pytest.raises(ValueError, match=r"was made for the model 'a/b' of 3 layers, got 28"):
        QuestConfig.load(path, model="a/b", num_layers=28)
    UNLIKE.save(path, num_layers=3)
    with pytest.raises(ValueError, match=r"was made for a model of 3 layers, got 28"):
        QuestConfig.load(path, num_layers=28)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", r"must hold a JSON object, got \[1\]"),
        ("{}", f"must have version {VERSION}, which this quest_ops reads, got null"),
        ({"version": 2}, f"must have version {VERSION}, which this quest_ops reads, got 2"),
        ({"version": True}, f"must have version {VERSION}, which this quest_ops reads, got true"),
        ({"budgets": 64}, "has an unknown key 'budgets': the keys are version, model, num_layers, budget, "),
        ({"selector": "mine"}, "has an unknown key 'selector'"),
        ({"budget": "64"}, 'budget must be a whole number or a list, got "64"'),
        ({"budget": 64.0}, "budget must be a whole number or a list, got 64.0"),
        ({"budget": None}, "budget must be a whole number or a list, got null"),
        ({"budget": [64, "64"]}, "config.json: budget of layer 1 must be a whole number or None, got '64'"),
        ({"budget": [64, 40]}, "config.json: budget of layer 1 must be 0 or a multiple of page_size, 16, got 40"),
        ({"budget": [64], "num_layers": 2}, "says num_layers 2, and its budget has 1 numbers"),
        ({"page_size": 16.0}, "page_size must be a whole number, got 16.0"),
        ({"sink_pages": True}, "sink_pages must be a whole number, got true"),
        ({"dense_layers": None}, "dense_layers must be a whole number, got null"),
        ({"bounds": 4}, "bounds must be a string, got 4"),
        ({"bounds": "int2"}, "config.json: bounds must be one of cache, int8, int4, got 'int2'"),
        ({"std_factor": "one"}, 'std_factor must be a number or null, got "one"'),
        ({"dense_below": 0.5}, "dense_below must be a whole number, got 0.5"),
        ({"model": 7}, "model must be a string or null, got 7"),
        ({"num_layers": 1.5}, "num_layers must be a whole number or null, got 1.5"),
    ],
)
def test_bad_files(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps({"version": VERSION} | content)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        QuestConfig.load(tmp_path / "config.json")
    assert "config.json" in str(error.value)
