"""Common words: find the words that a long list names most often (RULER: Hsieh et al., COLM 2024)."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from ..errors import InputError
from .base import Sample, Setup, Task
from .metrics import share_found

if TYPE_CHECKING:
    import random

#: Words that are common.
COMMON = 10
# How often a common and an uncommon word is named, as in RULER: in long lists, in lists under 4096 tokens, and in the
# worked example with its number of uncommon words.
_LONG, _SHORT, _EXAMPLE, _EXAMPLE_UNCOMMON = (30, 3), (6, 1), (3, 1), 10
_SHORT_BELOW = 4096
_QUESTION = f"\nQuestion: which {COMMON} words does the list name most often?\nAnswer: the {COMMON} words are"
_OPENING = "\nBelow is a numbered list of words. Some of them are named more often than others.\n"


class CommonWords(Task):
    """Ten words are named 30 times in a list, all others 3 times; below 4096 tokens 6 times and once.

    As in RULER, a worked example stands before the list, and the score is the share of common words in the answer.
    Words are those of the user's text, of 4 to 9 letters. A few tokens of the text before the list fill the prompt up
    to the wanted length.
    """

    name = "common-words"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._encode = functools.cache(setup.tokenizer.encode)
        self.answer_tokens = len(self._listing(["somewhat"] * COMMON))

    @functools.cached_property
    def _words(self) -> list[str]:
        assert self.setup.text is not None
        return sorted(set(re.findall(r"\b[a-z]{4,9}\b", self.setup.text.text)))

    def samples(self, length: int) -> list[Sample]:
        return [self._sample(i, length, self.setup.rng(self.name, length, i)) for i in range(self.setup.tries)]

    def _sample(self, index: int, length: int, rng: random.Random) -> Sample:
        assert self.setup.text is not None
        if len(self._words) < 2 * COMMON + _EXAMPLE_UNCOMMON:
            raise InputError(
                f"the text ({self.setup.text.name}) has too few words for {self.name}: give another --text"
            )
        words = rng.sample(self._words, len(self._words))
        example, words = words[: COMMON + _EXAMPLE_UNCOMMON], words[COMMON + _EXAMPLE_UNCOMMON :]
        question = [*self._encode(_QUESTION)]
        opening = [
            *self._encode(_OPENING),
            *self._listing(_repeat(example, _EXAMPLE, rng)),
            *question,
            *self._listing(example[:COMMON]),
            *self._encode("\n" + _OPENING),
        ]
        room = self.room(length, question) - len(opening)
        times = _SHORT if length < _SHORT_BELOW else _LONG
        named = self._fitting(words, times, room)
        if named <= COMMON:
            raise InputError(f"--lengths {length} leaves no room for the list of {self.name}: give a greater length")
        listed = self._listing(_repeat(words[:named], times, rng))
        filling, _ = self.setup.text.window(room - len(listed), rng)
        return self.prompt(index, filling + opening + listed, question, tuple(words[:COMMON]), None)

    def _listing(self, words: list[str]) -> list[int]:
        """A numbered list. Numbers and words are tokenised by themselves, so that any order has the same length."""
        entries = (entry for i, word in enumerate(words, 1) for entry in (f"\n{i}.", f" {word}"))
        return [token for entry in entries for token in self._encode(entry)]

    def _fitting(self, words: list[str], times: tuple[int, int], room: int) -> int:
        """The number of words, the common ones first, for which the list has room."""
        entries = tokens = 0
        for named, word in enumerate(words):
            repeats = times[0] if named < COMMON else times[1]
            tokens += repeats * len(self._encode(f" {word}"))
            tokens += sum(len(self._encode(f"\n{i}.")) for i in range(entries + 1, entries + repeats + 1))
            entries += repeats
            if tokens > room:
                return named
        return len(words)

    def score(self, answer: str, sample: Sample) -> float:
        return share_found(answer, sample.references)


def _repeat(words: list[str], times: tuple[int, int], rng: random.Random) -> list[str]:
    """The first ten words ``times[0]`` times and the others ``times[1]`` times, shuffled."""
    result = words[:COMMON] * times[0] + words[COMMON:] * times[1]
    rng.shuffle(result)
    return result
