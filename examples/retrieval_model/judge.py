"""Measurements: facts found, bits per byte, and the difference to transformers' computation."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .device import DEVICE
from .documents import IGNORED, PASS_KEY, Source, make_digits, make_names
from .model import Model


def shortest_length(facts: int) -> int:
    """The least length of a document that holds the facts and the question, whatever their names.

    A name has at most four syllables of three letters.
    """
    line = len(PASS_KEY.line("x" * 12, "00000", IGNORED)[0])
    return (facts + 1) * line - len(PASS_KEY.after)


def question_documents(text: np.ndarray, length: int, facts: int, count: int, seed: int = 7) -> Tensor:
    """``count`` documents of held-out text with facts at random depths, one asked for and answered at the very end.

    The depths of the facts that are asked for are spread evenly. Names are made up, never words.
    """
    rng = random.Random(seed * 7919 + length * 31 + facts)
    documents = []
    for i in range(count):
        names = make_names(rng, facts, [], 2, 4)
        asked = rng.randrange(facts)
        lines = [PASS_KEY.line(name, make_digits(rng), IGNORED)[0] for name in names]
        question = lines[asked][: -len(PASS_KEY.after)]
        room = length - len(question) - sum(map(len, lines))
        start = rng.randrange(len(text) - room)
        filler = text[start : start + room]
        depths = [int(room * rng.random()) for _ in names]
        depths[asked] = int(room * (i + 0.5) / count)
        parts, done = [], 0
        for depth, j in sorted(zip(depths, range(facts), strict=True)):
            parts += [filler[done:depth], lines[j]]
            done = depth
        documents.append(np.concatenate([*parts, filler[done:], question]))
    return torch.from_numpy(np.stack(documents))


def recall(model: Model, text: np.ndarray, length: int, facts: int, count: int) -> float:
    """Share of questions whose five digits are all right.

    The right digits are fed back. All five are then the most likely ones exactly where greedy decoding is right.
    """
    documents, right = question_documents(text, length, facts, count), []
    for part in documents.split(max(1, 131072 // length)):
        part = part.to(DEVICE)
        best = model.logits(part, 6)[:, :-1].argmax(-1)
        right.append((best == part[:, -5:].long()).all(1))
    return torch.cat(right).float().mean().item()


def bits_per_byte(model: Model, source: Source, length: int, count: int, seed: int = 3) -> float:
    rng, total = random.Random(seed), 0.0
    for _ in range(count):
        text = torch.from_numpy(source.excerpt(rng, length + 1).copy()).to(DEVICE).long()
        total += F.cross_entropy(model.logits(text[None, :-1], length)[0], text[1:]).item()
    return total / count / math.log(2)


def check_against_transformers(model: Model, folder: Path, source: Source, length: int) -> float:
    """Relative difference of the logits to those of the saved model, loaded by transformers in float32."""
    from transformers import Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    content, _ = source.needle_document(random.Random(5), length, 4, at_end=0.5)
    document = torch.from_numpy(content.copy()).to(DEVICE).long()[None]
    with torch.no_grad():
        expected = theirs(document).logits[0]
    return ((model.logits(document, length)[0] - expected).norm() / expected.norm()).item()
