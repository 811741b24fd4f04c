"""The settings of Quest in an engine: QuestConfig's keys, a budget for each layer, and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .. import config_file
from ..config import QuestConfig
from ..ops import PAGE_SIZES

#: The environment variable that turns Quest on.
VARIABLE = "QUEST_OPS_VLLM"
# A selector is a function, which no setting can carry to another process.
_CONFIG_KEYS = tuple(f.name for f in fields(QuestConfig) if f.name != "selector")
#: All keys. "report" is the seconds between two reports in the log, or 0 to count without logging. "config" is the file
#: of a QuestConfig, whose fields are taken where no key is given.
KEYS = (*_CONFIG_KEYS, "report", "config")


class RefusedError(RuntimeError):
    """Quest was asked for, and cannot work with these settings, this model or this engine."""


@dataclass(frozen=True)
class Settings:
    """Quest in an engine.

    Attributes:
        config: of the selection; its page_size is the engine's block size.
        budgets: tokens that each layer of the model reads; 0 for a dense layer of a list.
        report: seconds between two reports in the log; 0 counts without logging, None does not count.
    """

    config: QuestConfig
    budgets: tuple[int, ...]
    report: float | None = None

    @classmethod
    def of(cls, keys: Mapping[str, Any], block_size: int, num_layers: int) -> Settings:
        """The settings of the given keys, with QuestConfig's defaults for the rest.

        Args:
            keys: of :data:`KEYS`. ``budget`` is a number, or a list with one for each layer, 0 or None for dense ones.
            block_size: tokens of a block of the engine's cache.
            num_layers: of the model.

        Raises:
            RefusedError: an unknown key, or a value that is out of its range or does not go with the engine.
        """
        unknown = [key for key in keys if key not in KEYS]
        if unknown:
            raise RefusedError(f"quest_ops has no setting {unknown[0]!r}: it takes {', '.join(KEYS)}")
        keys = dict(keys)
        path = keys.pop("config", None)
        try:
            keys = keys if path is None else config_file.read(path, num_layers=num_layers) | keys
        except (OSError, TypeError, ValueError) as error:
            raise RefusedError(f"quest_ops: {error}") from None
        report = keys.pop("report", None)
        if report is not None and not (_is_number(report) and report >= 0):
            raise RefusedError(f"quest_ops: report must be seconds, at least 0, got {report!r}")
        if block_size not in PAGE_SIZES:
            allowed = ", ".join(map(str, PAGE_SIZES))
            raise RefusedError(
                f"quest_ops takes blocks of {allowed} tokens, got {block_size}: set the engine's block size"
            )
        if keys.setdefault("page_size", block_size) != block_size:
            raise RefusedError(
                f"quest_ops: page_size must be the engine's block size, {block_size}, got {keys['page_size']}: "
                f"leave it out, or start the engine with --block-size {keys['page_size']}"
            )
        if keys.get("std_factor") == "none":
            keys["std_factor"] = None
        budget = keys.pop("budget", QuestConfig.budget)
        listed = isinstance(budget, list | tuple)
        budgets = [0 if number is None else number for number in budget] if listed else [budget] * num_layers
        if len(budgets) != num_layers:
            raise RefusedError(
                f"quest_ops: a list of budgets must have one for each of {num_layers} layers, got {len(budgets)}"
            )
        for number in budgets:
            if isinstance(number, bool) or not isinstance(number, int) or number < (not listed) or number % block_size:
                raise RefusedError(
                    f"quest_ops: budget must be a multiple of the block size, {block_size}, got {number!r}"
                )
        try:
            config = QuestConfig(budget=budgets if listed else budget, **keys)
        except (TypeError, ValueError) as error:
            raise RefusedError(f"quest_ops: {error}") from None
        if config.candidates:
            raise RefusedError(
                f"quest_ops: candidates must be 0 in an engine, whose blocks have no room for codes, "
                f"got {config.candidates}"
            )
        if config.reselect_every > 1:
            raise RefusedError(
                f"quest_ops: reselect_every must be 1 in an engine, whose requests change places between steps, "
                f"got {config.reselect_every}"
            )
        if config.recent_pages < 1:
            # A chunk of a resumed request is written before its tokens select. Its newest page must not compete then.
            raise RefusedError("quest_ops: recent_pages must be at least 1 in an engine, got 0")
        return cls(config, tuple(budgets), None if report is None else float(report))

    @property
    def keys(self) -> dict[str, Any]:
        """The keys that :meth:`of` makes these settings from; plain values, which any process can read."""
        keys = {key: value for key, value in asdict(replace(self.config, selector=None)).items() if key in _CONFIG_KEYS}
        budget = list(self.budgets) if isinstance(self.config.budget, tuple) else self.config.budget
        return {**keys, "budget": budget, **({} if self.report is None else {"report": self.report})}


def parse(text: str) -> dict[str, Any] | None:
    """The keys of the environment variable: ``budget=2048,dense_layers=2``, or a JSON object; None where it is off.

    Raises:
        RefusedError: neither of the two.
    """
    text = text.strip()
    if text in ("", "0"):
        return None
    if text.startswith("{"):
        try:
            keys: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise RefusedError(f"{VARIABLE} is no JSON object: {error}") from None
        return keys
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(equals and value for _, equals, value in pairs):
        raise RefusedError(f"{VARIABLE} must look like budget=2048,dense_layers=2, or be a JSON object, got {text!r}")
    return {key.strip(): _number_or_word(value.strip()) for key, _, value in pairs}


def _number_or_word(text: str) -> int | float | str:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"\d*\.\d+", text) else text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
