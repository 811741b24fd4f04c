"""The base of every task: prompts of a wanted length, and a score for each answer."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from . import genres

if TYPE_CHECKING:
    from pathlib import Path

    from ..models import Tokenizer
    from .text import Text


@dataclass(frozen=True)
class Sample:
    """One try.

    Attributes:
        index: number of the try within the task and length.
        ids: the whole prompt, question included, or the text that is scored.
        tail: tokens at the end that are decoded under the policy: the question, or the tokens that are scored.
        references: right answers.
        depth: where in the text the answer stands, from 0 to 1; None: in no one place.
        genre: of the text, where a task has several.
    """

    index: int
    ids: list[int]
    tail: int
    references: tuple[str, ...] = ()
    depth: float | None = None
    genre: str | None = None


@dataclass(frozen=True)
class Setup:
    """The material and the settings that tasks are made from.

    Attributes:
        tokenizer: of the model.
        text: facts are hidden in it; None for tasks that bring their own.
        tries: samples for each length.
        seed: decides names, keys, places and windows of the text.
        chat: put prompts into the model's chat template.
        depths: where the fact that is asked for stands, one after the other.
        needles: facts in a text of the task "needles".
        scored: tokens at the end of a text that "perplexity", "loss" and "pg19" decode and score.
        genres: texts of the task "loss", see :mod:`quest_eval.tasks.genres`.
        data: a folder with the files of LongBench or PG19; None: from the Hugging Face hub.
    """

    tokenizer: Tokenizer
    text: Text | None = None
    tries: int = 20
    seed: int = 0
    chat: bool = False
    depths: tuple[float, ...] = tuple((i + 0.5) / 10 for i in range(10))
    needles: int = 8
    scored: int = 256
    genres: tuple[str, ...] = genres.NAMES
    data: Path | None = None

    def rng(self, task: str, length: int, index: int) -> random.Random:
        """Random numbers of one try: the same for the same seed, whatever PYTHONHASHSEED is."""
        return random.Random(f"{task}, {length} tokens, try {index} of seed {self.seed}")


class Task(ABC):
    """A task. A ``length`` counts everything: text, question, chat template and answer."""

    #: "accuracy", "F1", "ROUGE-L" (all from 0 to 1, higher is better), "perplexity" or "perplexity over dense".
    metric: str = "accuracy"
    name: str
    #: Tokens of an answer; 0: nothing is answered, the tail itself is scored.
    answer_tokens: int

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def samples(self, length: int) -> list[Sample]:
        """The tries of a length.

        Raises:
            InputError: a length, text or data set that the task cannot use.
        """

    def score(self, answer: str, sample: Sample) -> float:  # noqa: ARG002 (there are tasks without answers)
        """The score of an answer, from 0 to 1."""
        raise InputError(f"task {self.name} scores texts and takes no answers")

    @property
    def chats(self) -> bool:
        """Whether prompts are put into the chat template."""
        return self.setup.chat

    def frame(self) -> tuple[list[int], list[int]]:
        """Tokens before the context and behind the question."""
        return self.setup.tokenizer.frame(self.chats)

    def room(self, length: int, question: list[int]) -> int:
        """Tokens of context that go with a question into a sequence of ``length``."""
        before, behind = self.frame()
        return length - len(before) - len(question) - len(behind) - self.answer_tokens

    def prompt(
        self, index: int, context: list[int], question: list[int], references: tuple[str, ...], depth: float | None
    ) -> Sample:
        """A sample of context and question, in the model's frame."""
        before, behind = self.frame()
        ids = before + context + question + behind
        return Sample(index, ids, len(question) + len(behind), references, depth)
