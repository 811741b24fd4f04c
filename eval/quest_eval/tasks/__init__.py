"""Tasks: the questions that models are asked, at any length."""

from __future__ import annotations

from .base import Sample, Setup, Task
from .common_words import CommonWords
from .hidden_facts import HiddenFacts
from .longbench import DATA_SETS, LongBench
from .loss import Loss
from .passkey import Needles, Passkey
from .perplexity import PG19, Perplexity
from .variable_tracking import VariableTracking

_IN_TEXT: dict[str, type[Task]] = {
    "passkey": Passkey,
    "needles": Needles,
    "variable-tracking": VariableTracking,
    "common-words": CommonWords,
    "perplexity": Perplexity,
    "facts": HiddenFacts,
}
#: Tasks that are made from a text, and names on the command line.
NEEDS_TEXT = tuple(_IN_TEXT)
NAMES = (*NEEDS_TEXT, "loss", "pg19", *DATA_SETS)


def make(name: str, setup: Setup) -> Task:
    """The task of that name.

    Raises:
        InputError: a file or package that it needs is missing.
    """
    if name in DATA_SETS:
        return LongBench(name, setup)
    of_texts: dict[str, type[Task]] = {"loss": Loss, "pg19": PG19}
    return (of_texts | _IN_TEXT)[name](setup)


__all__ = ["NAMES", "NEEDS_TEXT", "Sample", "Setup", "Task", "make"]
