"""Facts with made-up names and random keys, and a text of bytes in which several are hidden."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..errors import InputError
from .text import insert

KEY_DIGITS = 5
_FACT = "\nThe pass key of {name} is {key}.\n"
_QUESTION = "\nThe pass key of {name} is "
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


@dataclass(frozen=True)
class Fact:
    name: str
    key: str
    #: Where the fact's line begins and ends in the text, in tokens.
    start: int = 0
    stop: int = 0

    @property
    def line(self) -> bytes:
        return _FACT.format(name=self.name, key=self.key).encode()

    @property
    def question(self) -> bytes:
        """The text that the model reads before it answers with the key's digits."""
        return _QUESTION.format(name=self.name).encode()


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it. One token is one byte."""

    text: bytes
    facts: list[Fact]


def make_facts(count: int, rng: random.Random) -> list[Fact]:
    """``count`` facts with made-up names, all different, and random keys."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 4)))
        names[name.capitalize()] = None
    return [Fact(name, f"{rng.randrange(10**KEY_DIGITS):0{KEY_DIGITS}d}") for name in names]


def least_tokens(count: int) -> int:
    """The shortest text in which ``count`` facts are hidden rather than listed."""
    return 128 * count


def hide_facts(text: bytes, num_tokens: int, count: int, seed: int) -> Haystack:
    """Hide ``count`` facts at line ends, their depths spread over a text of ``num_tokens`` tokens, facts included.

    Args:
        text: at least ``num_tokens`` bytes, cut to length.
        num_tokens: the length of the result, at least :func:`least_tokens`.
        count: number of facts.
        seed: decides names, keys and depths.

    Raises:
        InputError: the text or the wanted length is too short.
    """
    if count < 1:
        raise InputError(f"the number of facts must be at least 1, got {count}")
    if num_tokens < least_tokens(count):
        raise InputError(f"{count} facts need a text of at least {least_tokens(count)} tokens, got {num_tokens}")
    if len(text) < num_tokens:
        raise InputError(f"the text has {len(text)} bytes, one token each; {num_tokens} tokens were asked for")
    rng = random.Random(seed)
    facts = make_facts(count, rng)
    filler = text[: num_tokens - sum(len(fact.line) for fact in facts)]
    line_starts = [i + 1 for i, byte in enumerate(filler) if byte == ord("\n")]
    lines = [((i + rng.random()) / count, list(fact.line)) for i, fact in enumerate(facts)]
    hidden, starts = insert((list(filler), line_starts), lines)
    placed = [Fact(fact.name, fact.key, at, at + len(fact.line)) for fact, at in zip(facts, starts, strict=True)]
    return Haystack(bytes(hidden), placed)
