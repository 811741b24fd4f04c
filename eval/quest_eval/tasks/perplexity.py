"""Perplexity of real texts that are decoded token by token."""

from __future__ import annotations

from functools import cached_property

from ..errors import InputError
from . import hub
from .base import Sample, Task


class Perplexity(Task):
    """Windows of the text. Their last ``setup.scored`` tokens are decoded under the policy, all others read densely."""

    metric = "perplexity"
    name = "perplexity"
    answer_tokens = 0

    def samples(self, length: int) -> list[Sample]:
        return [self._sample(i, self._text(length, i), length) for i in range(self.setup.tries)]

    def _text(self, length: int, index: int) -> list[int]:
        assert self.setup.text is not None
        room = length - len(self.frame()[0])
        return self.setup.text.window(room, self.setup.rng(self.name, length, index))[0]

    def _sample(self, index: int, text: list[int], length: int, genre: str | None = None) -> Sample:
        if self.setup.chat:
            raise InputError(f"task {self.name} scores plain text: leave --chat away")
        if self.setup.scored < 1 or length < 2:
            raise InputError(f"--scored must be at least 1 and --lengths 2, got {self.setup.scored} and {length}")
        ids = self.frame()[0] + text
        return Sample(index, ids, min(self.setup.scored, len(ids) - 1), genre=genre)


class PG19(Perplexity):
    """The beginnings of PG19's test books, in their order, where they are long enough.

    Rae et al., "Compressive Transformers for Long-Range Sequence Modelling", ICLR 2020.
    """

    name = "pg19"

    @cached_property
    def _books(self) -> list[list[int]]:
        return [self.setup.tokenizer.encode(text) for text in hub.pg19(self.setup.data, self.setup.tries)]

    def samples(self, length: int) -> list[Sample]:
        room = length - len(self.frame()[0])
        books = [book[:room] for book in self._books if len(book) >= room]
        if not books:
            longest = max(map(len, self._books), default=0)
            raise InputError(
                f"pg19's books have up to {longest} tokens where {room} are needed: give smaller --lengths"
            )
        return [self._sample(i, book, length) for i, book in enumerate(books)]
