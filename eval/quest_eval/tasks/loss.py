"""The loss of real texts of several genres behind long contexts, beside that of dense attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from . import genres
from .perplexity import Perplexity
from .text import Text

if TYPE_CHECKING:
    from .base import Sample, Setup


class Loss(Perplexity):
    """Windows of several genres in turn. Their last ``setup.scored`` tokens are decoded under the policy.

    The metric is the policy's perplexity over that of dense attention on the same tokens, the geometric mean of the
    tries: 1 is dense, and texts that are hard for the model count as much as easy ones.
    """

    metric = "perplexity over dense"
    name = "loss"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        unknown = [name for name in setup.genres if name not in genres.NAMES]
        if unknown or not setup.genres:
            raise InputError(f"--genres must be of {', '.join(genres.NAMES)}, got {' '.join(unknown) or 'none'}")
        self._texts = {name: Text(genres.read(name), setup.tokenizer, name) for name in dict.fromkeys(setup.genres)}

    def samples(self, length: int) -> list[Sample]:
        names = list(self._texts)
        return [self._of_genre(i, names[i % len(names)], length) for i in range(self.setup.tries)]

    def _of_genre(self, index: int, genre: str, length: int) -> Sample:
        rng = self.setup.rng(f"{self.name}, {genre}", length, index)
        text, _ = self._texts[genre].window(length - len(self.frame()[0]), rng)
        return self._sample(index, text, length, genre)
