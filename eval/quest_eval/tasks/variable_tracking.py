"""Variable tracking: follow a chain of assignments through a text (RULER: Hsieh et al., COLM 2024)."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from ..errors import InputError
from .base import Sample, Setup, Task
from .metrics import share_found
from .text import insert

if TYPE_CHECKING:
    import random

#: Assignments of a variable to another in a chain, as RULER's default.
HOPS = 4
_NAME_LETTERS, _EXAMPLE_LETTERS = 5, 3
_OPENING = "\nVariables are assigned in the text below. Keep track of the values that they have.\n\n"


class VariableTracking(Task):
    """A number is given to a variable, which is given to a second, and so on; the answer names them all.

    As in RULER: one chain of four hops, a worked example before the text, up to 30 words of answer. The score is the
    share of names in the answer. The text is the user's in place of RULER's repeated sentences.
    """

    name = "variable-tracking"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        names = " ".join(["XKQZJ"] * (HOPS + 1))
        self.answer_tokens = len(setup.tokenizer.encode(names)) + 5

    def samples(self, length: int) -> list[Sample]:
        return [self._sample(i, length, self.setup.rng(self.name, length, i)) for i in range(self.setup.tries)]

    def _sample(self, index: int, length: int, rng: random.Random) -> Sample:
        assert self.setup.text is not None
        encode = self.setup.tokenizer.encode
        example_names, example_value = _names(rng, _EXAMPLE_LETTERS), _value(rng)
        names, value = _names(rng, _NAME_LETTERS), _value(rng)
        example = "".join(_chain(example_names, example_value)) + _question(example_value) + " ".join(example_names)
        opening = encode(_OPENING + example + _OPENING)
        chain = [encode(line) for line in _chain(names, value)]
        question = encode(_question(value, space=self.setup.tokenizer.bytewise))
        room = self.room(length, question) - len(opening) - sum(map(len, chain))
        if room < length // 4:
            least = 2 * (length - room)
            raise InputError(f"--lengths must be at least about {least} for {self.name}, got {length}")
        depths = sorted(rng.random() for _ in chain)
        context, _ = insert(self.setup.text.window(room, rng), list(zip(depths, chain, strict=True)))
        return self.prompt(index, opening + context, question, tuple(names), None)

    def score(self, answer: str, sample: Sample) -> float:
        return share_found(answer, sample.references)


def _names(rng: random.Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _value(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def _chain(names: list[str], value: str) -> list[str]:
    values = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"\nVAR {name} = {value}.\n" for name, value in zip(names, values, strict=True)]


def _question(value: str, space: bool = True) -> str:
    return (
        f"\nQuestion: which variables have the value {value} in the text above?\n"
        f"Answer: these {HOPS + 1} variables have the value {value}:{' ' if space else ''}"
    )
