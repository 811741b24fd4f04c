"""Scores of answers, by the rules of each benchmark's authors."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def share_found(answer: str, references: Sequence[str]) -> float:
    """The share of references that occur in the answer, in upper or lower case (RULER)."""
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def f1(answer: str, reference: str) -> float:
    """F1 of the words that answer and reference have in common, each as often as in both (SQuAD, LongBench).

    Case, punctuation and English articles do not count.
    """
    said, right = _words(answer), _words(reference)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right)) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F of ROUGE-L by the package ``rouge``, which LongBench uses too; 0 where either is empty."""
    from rouge import Rouge

    if not answer.strip(" .\n") or not reference.strip(" .\n"):
        return 0.0
    return float(Rouge(metrics=["rouge-l"]).get_scores([answer], [reference], avg=True)["rouge-l"]["f"])


def check_rouge() -> None:
    """Raise InputError where the package is missing."""
    try:
        import rouge  # noqa: F401
    except ImportError as error:
        raise InputError("ROUGE-L needs the package rouge: run `pip install rouge`") from error


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()
