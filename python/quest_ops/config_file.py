"""The file of a QuestConfig: JSON with a field a line, and the model that it was made for.

    {
      "version": 1,
      "model": "Qwen/Qwen3-0.6B",
      "num_layers": 28,
      "budget": [0, 512, 256, ...],
      "page_size": 16,
      ...
    }

A field that a file leaves out has QuestConfig's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

#: Of the format. Another one is refused, so that no later meaning of a field is taken for this one.
VERSION = 1

# The types of each field. A selector is a function, which no file holds.
_FIELDS: dict[str, tuple[type, ...]] = {
    "budget": (int, list),
    "page_size": (int,),
    "sink_pages": (int,),
    "recent_pages": (int,),
    "dense_layers": (int,),
    "group_reduce": (str,),
    "bounds": (str,),
    "std_factor": (float, int, NoneType),
    "dense_below": (int,),
    "candidates": (int,),
    "reselect_every": (int,),
}
_ABOUT: dict[str, tuple[type, ...]] = {"version": (int,), "model": (str, NoneType), "num_layers": (int, NoneType)}
_WORDS = {int: "a whole number", float: "a number", str: "a string", list: "a list", NoneType: "null"}


def write(path: str | Path, config: Any, model: str | None, num_layers: int | None) -> None:
    """Write a QuestConfig: the work of :meth:`quest_ops.QuestConfig.save`."""
    if config.selector is not None:
        raise ValueError(
            "a configuration with a selector cannot be saved, since a file holds no function: "
            "save dataclasses.replace(config, selector=None), and set the selector after loading"
        )
    listed = isinstance(config.budget, tuple)
    if num_layers is not None:
        config.check_num_layers(num_layers)
    elif listed:
        num_layers = len(config.budget)
    content = {"version": VERSION, "model": model, "num_layers": num_layers}
    content |= {name: getattr(config, name) for name in _FIELDS}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    Path(path).write_text(f"{{\n{lines}\n}}\n")


def read(path: str | Path, model: str | None = None, num_layers: int | None = None) -> dict[str, Any]:
    """The fields in a file: the work of :meth:`quest_ops.QuestConfig.load`.

    Raises:
        ValueError: as ``load``, but for values out of their ranges.
    """
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {_short(content)}")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path} must have version {VERSION}, which this quest_ops reads, got {_short(version)}")
    types = _ABOUT | _FIELDS
    for name, value in content.items():
        if name not in types:
            raise ValueError(f"{path} has an unknown key {name!r}: the keys are {', '.join(types)}")
        if type(value) not in types[name]:  # isinstance would take true for a number
            words = " or ".join(_WORDS[each] for each in types[name] if each is not int or float not in types[name])
            raise ValueError(f"{path}: {name} must be {words}, got {_short(value)}")
    _check_model(path, content, model, num_layers)
    return {name: value for name, value in content.items() if name in _FIELDS}


def _check_model(path: str | Path, content: Mapping[str, Any], model: str | None, num_layers: int | None) -> None:
    made_for, layers, budget = content.get("model"), content.get("num_layers"), content.get("budget")
    if None not in (model, made_for) and model != made_for:
        raise ValueError(f"{path} was made for the model {made_for!r}, got {model!r}")
    listed = len(budget) if isinstance(budget, list) else None
    if None not in (listed, layers) and listed != layers:
        raise ValueError(f"{path} says num_layers {layers}, and its budget has {listed} numbers")
    layers = listed if layers is None else layers
    if None not in (num_layers, layers) and num_layers != layers:
        whose = f"the model {made_for!r}" if made_for else "a model"
        raise ValueError(f"{path} was made for {whose} of {layers} layers, got {num_layers}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
