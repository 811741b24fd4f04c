"""The task: facts hidden in a real text, to be asked for. One token is one byte."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

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
        """What the model reads before it answers with the key's digits."""
        return _QUESTION.format(name=self.name).encode()


@dataclass(frozen=True)
class Haystack:
    text: bytes
    facts: list[Fact]


def standard_library_text(num_bytes: int) -> bytes:
    """The sources of the running Python's standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces, missing = [], num_bytes
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if missing <= 0:
            break
        if "site-packages" not in path.parts:
            pieces.append(path.read_bytes())
            missing -= len(pieces[-1])
    return b"".join(pieces)[:num_bytes]


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
    """``count`` facts at line ends, their depths spread over a text of ``num_tokens`` tokens, facts included.

    Args:
        text: at least ``num_tokens`` bytes, cut to what is needed.
        num_tokens: the length of the result, at least :func:`least_tokens`.
        count: number of facts.
        seed: decides names, keys and depths.

    Raises:
        ValueError: where the text or the wanted length is too short.
    """
    if count < 1:
        raise ValueError(f"the number of facts must be at least 1, got {count}")
    if num_tokens < least_tokens(count):
        raise ValueError(f"{count} facts need a text of at least {least_tokens(count)} tokens, got {num_tokens}")
    if len(text) < num_tokens:
        raise ValueError(f"the text has {len(text)} bytes, one token each; {num_tokens} tokens were asked for")
    rng = random.Random(seed)
    facts = make_facts(count, rng)
    filler = text[: num_tokens - sum(len(fact.line) for fact in facts)]
    result, placed, taken = bytearray(), [], 0
    for i, fact in enumerate(facts):
        depth = int((i + rng.random()) / count * len(filler))
        # Not before the fact before it, and at the end of a line where there is one before the next fact's share.
        line_end = filler.find(b"\n", depth, len(filler) * (i + 1) // count) + 1
        place = max(taken, line_end or depth)
        result += filler[taken:place]
        placed.append(Fact(fact.name, fact.key, len(result), len(result) + len(fact.line)))
        result += fact.line
        taken = place
    result += filler[taken:]
    return Haystack(bytes(result), placed)
