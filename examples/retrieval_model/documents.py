"""Documents. Each is a pair of arrays: bytes, and the kind of each byte, which decides its loss."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

IGNORED, TEXT, ANSWER = 0, 1, 2
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
Document = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Style:
    """The wording of a fact."""

    before: str = "\nThe pass key of "
    between: str = " is "
    after: str = ".\n"

    def line(self, name: str, digits: str, digits_kind: int) -> Document:
        start = (self.before + name + self.between).encode()
        line = start + digits.encode() + self.after.encode()
        kinds = np.full(len(line), TEXT, np.uint8)
        kinds[len(start) : len(start) + len(digits)] = digits_kind
        return np.frombuffer(line, np.uint8), kinds


PASS_KEY = Style()


def make_digits(rng: random.Random) -> str:
    return f"{rng.randrange(100000):05d}"


def make_name(rng: random.Random, words: list[str], least: int = 1, most: int = 4) -> str:
    """A word of the corpus, or ``least`` to ``most`` made-up syllables."""
    if words and rng.random() < 0.33:
        word = rng.choice(words)
        return word.capitalize() if rng.random() < 0.5 else word
    syllables = [
        rng.choice(CONSONANTS) + rng.choice(VOWELS) + (rng.choice(CONSONANTS) if rng.random() < 0.3 else "")
        for _ in range(rng.randint(least, most))
    ]
    name = "".join(syllables)
    return name.capitalize() if rng.random() < 0.7 else name


def make_names(rng: random.Random, count: int, words: list[str], least: int = 1, most: int = 4) -> list[str]:
    """Different names. A dict, not a set: the order must not depend on string hashes."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[make_name(rng, words, least if count < 40 else 2, most)] = None
    shuffled = list(names)
    rng.shuffle(shuffled)
    return shuffled


@dataclass(frozen=True)
class Source:
    """The material of documents."""

    text: np.ndarray
    words: list[str]

    def excerpt(self, rng: random.Random, length: int) -> np.ndarray:
        start = rng.randrange(len(self.text) - length)
        return self.text[start : start + length]

    def text_document(self, rng: random.Random, length: int) -> Document:
        return self.excerpt(rng, length), np.full(length, TEXT, np.uint8)

    def needle_document(self, rng: random.Random, length: int, count: int, at_end: float) -> Document:
        """Text with facts at random depths, each asked for once: at the end, or at a random later place."""
        events, taken = [], 0
        for name in make_names(rng, count, self.words):
            digits = make_digits(rng)
            fact, question = PASS_KEY.line(name, digits, IGNORED), PASS_KEY.line(name, digits, ANSWER)
            if taken + 2 * len(fact[0]) > length - 8:
                break
            taken += len(fact[0]) + len(question[0])
            depth = rng.random()
            asked = 1.0 if rng.random() < at_end else depth + (1 - depth) * rng.random()
            events += [(depth, 0, rng.random(), fact), (asked, 1, rng.random(), question)]
        events.sort(key=lambda event: event[:3])
        filler = self.excerpt(rng, length - taken)
        parts, done = [], 0
        for depth, _, _, line in events:
            place = int(depth * len(filler))
            parts += [(filler[done:place], np.full(place - done, TEXT, np.uint8)), line]
            done = place
        parts.append((filler[done:], np.full(len(filler) - done, TEXT, np.uint8)))
        return join(parts)

    def dense_document(self, rng: random.Random, length: int) -> Document:
        """Many facts, many questions, hardly any text."""
        kind = rng.random()
        if kind < 0.6:
            style = PASS_KEY
        elif kind < 0.8:
            style = Style("", rng.choice([" is ", ": ", " = "]), rng.choice(["\n", ". ", "; "]))
        else:
            before = rng.choice(["key ", "\nThe code of ", "\n    "])
            style = Style(before, rng.choice([" is ", "="]), rng.choice([".\n", "\n", " "]))
        most_syllables = rng.choice([1, 2, 3, 4])
        most_facts = max(2, length // (2 * 24))
        known: dict[str, str] = {}
        unasked: list[str] = []
        parts, taken = [], 0
        while taken < length:
            if unasked and (rng.random() < 0.5 or len(known) >= most_facts):
                name = unasked.pop(rng.randrange(len(unasked)))
                part = style.line(name, known[name], ANSWER)
            else:
                name = make_name(rng, self.words, 1, most_syllables)
                if name in known:
                    part = style.line(name, known[name], ANSWER)
                else:
                    known[name] = make_digits(rng)
                    if len(known) <= most_facts:
                        unasked.append(name)
                    part = style.line(name, known[name], IGNORED)
                    if rng.random() < 0.15:
                        part = join([part, self.text_document(rng, rng.randrange(1, 60))])
            parts.append(part)
            taken += len(part[0])
        content, kinds = join(parts)
        return content[:length], kinds[:length]


def join(parts: list[Document]) -> Document:
    return np.concatenate([content for content, _ in parts]), np.concatenate([kinds for _, kinds in parts])


def repeat_document(rng: random.Random, length: int) -> Document:
    """A random string, repeated: plain induction. The first round cannot be predicted, so it has no loss."""
    period = rng.randint(12, max(13, length // 3))
    alphabet = b"abcdefghijklmnopqrstuvwxyz0123456789 "
    segment = np.frombuffer(bytes(rng.choice(alphabet) for _ in range(period)), np.uint8)
    rounds = -(-length // period)
    kinds = np.full(rounds * period, ANSWER, np.uint8)
    kinds[: period + 2] = IGNORED
    return np.tile(segment, rounds)[:length], kinds[:length]
