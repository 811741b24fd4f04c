"""Facts hidden in a real text: one ("passkey", as in the Quest paper), or one among others that look like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from .base import Sample, Setup, Task
from .facts import KEY_DIGITS, Fact, least_tokens, make_facts
from .text import insert

if TYPE_CHECKING:
    import random

# Tokens of an answer beside the key itself: for the words of a chat model, for the punctuation of another.
_CHAT_TOKENS, _OTHER_TOKENS = 32, 4


class Needles(Task):
    """Several facts, of which one is asked for. It stands at the depths of ``setup`` in turn, the others anywhere.

    This is RULER's multi-key retrieval (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context
    Language Models?", COLM 2024). An answer is right if it has the key's digits in it.
    """

    name = "needles"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.count = setup.needles
        if self.count < 1:
            raise InputError(f"--needles must be at least 1, got {self.count}")
        more = _CHAT_TOKENS if setup.chat else _OTHER_TOKENS
        self.answer_tokens = KEY_DIGITS
        if not setup.tokenizer.bytewise:
            self.answer_tokens = len(setup.tokenizer.encode(" " + "8" * KEY_DIGITS)) + more

    def samples(self, length: int) -> list[Sample]:
        least = least_tokens(self.count)
        if length < least:
            raise InputError(f"--lengths must be at least {least} for {self.count} facts, got {length}")
        return [self._sample(i, length, self.setup.rng(self.name, length, i)) for i in range(self.setup.tries)]

    def _sample(self, index: int, length: int, rng: random.Random) -> Sample:
        assert self.setup.text is not None
        encode = self.setup.tokenizer.encode
        asked, *others = make_facts(self.count, rng)
        depths = [self.setup.depths[index % len(self.setup.depths)], *(rng.random() for _ in others)]
        lines = [encode(fact.line.decode()) for fact in (asked, *others)]
        question = encode(self._question(asked))
        window = self.setup.text.window(self.room(length, question) - sum(map(len, lines)), rng)
        context, _ = insert(window, list(zip(depths, lines, strict=True)))
        return self.prompt(index, context, question, (asked.key,), depths[0])

    def _question(self, fact: Fact) -> str:
        if self.setup.chat:
            return f"\nWhat is the pass key of {fact.name}? Answer with the number alone."
        # Most tokenizers make a space part of the next word, so no model has seen one alone at the end.
        question = fact.question.decode()
        return question if self.setup.tokenizer.bytewise else question.rstrip(" ")

    def score(self, answer: str, sample: Sample) -> float:
        return float(sample.references[0] in answer)


class Passkey(Needles):
    """One fact."""

    name = "passkey"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.count = 1
