"""The six data sets of LongBench that the Quest paper reports.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", ACL 2024.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import InputError
from . import hub
from .base import Sample, Setup, Task
from .metrics import check_rouge, f1, rouge_l

if TYPE_CHECKING:
    from typing import Any

_BRIEFLY = "Answer as briefly as you can, with a word or a short phrase, and explain nothing."
_ONLY = "Give the answer alone and no other words."
_PAPER = (
    "Answer with a short phrase or sentence, without explanation. If the article does not tell, write "
    '"unanswerable". If it is a yes/no question, write "yes", "no" or "unanswerable".'
)


@dataclass(frozen=True)
class DataSet:
    """The prompt and the score of one data set.

    Attributes:
        before: the prompt's text before the context.
        behind: the prompt's text behind it; ``{input}`` is the question.
        answer_tokens: as the authors set it.
        metric: "F1" or "ROUGE-L".
        one_line: few-shot prompts: no chat template, and only an answer's first line counts.
    """

    before: str
    behind: str
    answer_tokens: int
    metric: str = "F1"
    one_line: bool = False


DATA_SETS: dict[str, DataSet] = {
    "qasper": DataSet(
        f"Below are a scientific article and a question about it. {_PAPER}\n\nArticle: ",
        f"\n\nNow answer the question about the article. {_PAPER}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
    ),
    "narrativeqa": DataSet(
        f"Below are a story, a novel or a film script, and a question about it. {_BRIEFLY}\n\nStory: ",
        f"\n\nNow answer the question about the story. {_BRIEFLY}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
    ),
    "hotpotqa": DataSet(
        f"Answer the question from the passages below. {_ONLY}\n\nThe passages:\n",
        f"\n\nAnswer the question from the passages above. {_ONLY}\n\nQuestion: {{input}}\nAnswer:",
        32,
    ),
    "multifieldqa_en": DataSet(
        "Read this text and answer a question about it briefly.\n\n",
        f"\n\nNow answer the question about the text above. {_ONLY}\n\nQuestion: {{input}}\nAnswer:",
        64,
    ),
    "gov_report": DataSet(
        "Below is a report of a government agency. Summarise it on one page.\n\nReport:\n",
        "\n\nNow summarise the report on one page.\n\nSummary:",
        512,
        metric="ROUGE-L",
    ),
    "triviaqa": DataSet(
        f"Answer the question from the passage. {_ONLY} Some examples come first.\n\n", "\n\n{input}", 32, one_line=True
    ),
}


class LongBench(Task):
    """One data set. A prompt longer than the wanted length loses its middle, as in the authors' code.

    Prompts are asked in our own words, with the authors' structure: compare scores with each other rather than with
    published ones.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        self._data = DATA_SETS[name]
        # Few-shot prompts have no chat template.
        super().__init__(replace(setup, chat=False) if self._data.one_line else setup)
        self.name, self.answer_tokens = name, self._data.answer_tokens
        self.metric = self._data.metric
        if self.metric == "ROUGE-L":
            check_rouge()
        self._rows = hub.longbench(name, setup.data)[: setup.tries]

    def samples(self, length: int) -> list[Sample]:
        return [self._sample(i, row, length) for i, row in enumerate(self._rows)]

    def _sample(self, index: int, row: dict[str, Any], length: int) -> Sample:
        encode = self.setup.tokenizer.encode
        question = encode(self._data.behind.replace("{input}", row["input"]))
        context = encode(self._data.before + row["context"])
        room = self.room(length, question)
        # Half of the prompt from its beginning, half from its end, where the question is.
        first = self.room(length, []) // 2
        last = room - first
        if last < 0:
            least = 2 * (length - room) + 2
            raise InputError(f"--lengths must be at least {least} for try {index} of {self.name}, got {length}")
        if len(context) > room:
            context = context[:first] + context[len(context) - last :]
        return self.prompt(index, context, question, tuple(row["answers"]), None)

    def score(self, answer: str, sample: Sample) -> float:
        if self._data.one_line:
            answer = answer.lstrip("\n").partition("\n")[0]
        measure = rouge_l if self.metric == "ROUGE-L" else f1
        return max((measure(answer, reference) for reference in sample.references), default=0.0)
