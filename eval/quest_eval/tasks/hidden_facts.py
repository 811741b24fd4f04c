"""A fact in the model's own words, hidden in real text and asked for through the chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .base import Sample, Setup, Task
from .text import insert

if TYPE_CHECKING:
    import random

#: Tokens of an answer: a sentence.
ANSWER_TOKENS = 32
_PEOPLE = ("Anna", "Carlos", "Emily", "George", "Helen", "James", "Laura", "Maria", "Peter", "Sarah", "Victor")
_PLACES = ("bakery", "castle", "church", "garage", "hotel", "library", "museum", "office", "school", "theatre")
_CITIES = ("Amsterdam", "Boston", "Cairo", "Dublin", "Helsinki", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague")
_THINGS = ("basket", "blanket", "bucket", "candle", "carpet", "hammer", "lantern", "mirror", "pillow", "violin")
_FRUITS = ("apricot", "banana", "cherry", "coconut", "grapefruit", "mango", "papaya", "peach", "raspberry")
_ANIMALS = ("camel", "dolphin", "donkey", "eagle", "elephant", "giraffe", "hedgehog", "penguin", "squirrel")


class Template(NamedTuple):
    """A fact as a sentence, its question, and the words from which its answer is drawn; none: a number of 4 digits."""

    sentence: str
    question: str
    answers: tuple[str, ...]


TEMPLATES = (
    Template(
        "{person} keeps the spare key of the {place} under the {answer}.",
        "Where does {person} keep the spare key of the {place}?",
        _THINGS,
    ),
    Template(
        "The secret word that opens the {place} in {city} is {answer}.",
        "What is the secret word that opens the {place} in {city}?",
        _ANIMALS,
    ),
    Template(
        "The favourite fruit of {person} from {city} is the {answer}.",
        "What is the favourite fruit of {person} from {city}?",
        _FRUITS,
    ),
    Template(
        "{person} lives in room {answer} of the hotel in {city}.",
        "In which room of the hotel in {city} does {person} live?",
        (),
    ),
)


class HiddenFacts(Task):
    """One fact at the depths of ``setup`` in turn. An answer is right if it has the fact's key word or number in it.

    Prompts are in the chat template wherever the model has one. Other models are given "Question" and "Answer".
    """

    name = "facts"
    answer_tokens = ANSWER_TOKENS

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.chat:
            self.frame()  # raises where there is no template

    @property
    def chats(self) -> bool:
        return self.setup.chat or self.setup.tokenizer.chats

    def samples(self, length: int) -> list[Sample]:
        return [self._sample(i, length, self.setup.rng(self.name, length, i)) for i in range(self.setup.tries)]

    def _sample(self, index: int, length: int, rng: random.Random) -> Sample:
        assert self.setup.text is not None
        encode = self.setup.tokenizer.encode
        template = TEMPLATES[rng.randrange(len(TEMPLATES))]
        answer = rng.choice(template.answers) if template.answers else str(rng.randint(1000, 9999))
        words = {"person": rng.choice(_PEOPLE), "place": rng.choice(_PLACES), "city": rng.choice(_CITIES)}
        fact = encode(f"\n{template.sentence.format(answer=answer, **words)}\n")
        asked = template.question.format(**words)
        question = encode(f"\n\n{asked} Answer in one sentence." if self.chats else f"\n\nQuestion: {asked}\nAnswer:")
        depth = self.setup.depths[index % len(self.setup.depths)]
        window = self.setup.text.window(self.room(length, question) - len(fact), rng)
        context, _ = insert(window, [(depth, fact)])
        return self.prompt(index, context, question, (answer,), depth)

    def score(self, answer: str, sample: Sample) -> float:
        return float(sample.references[0].lower() in answer.lower())
