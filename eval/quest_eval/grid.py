"""Runs cells: task x length x policy x budget. One prefill of a batch of contexts serves all policies and budgets."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from . import attention_path
from .session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from .journal import Journal
    from .models import Tokenizer
    from .policies import Policy
    from .tasks import Sample, Task

# Points of the curve of a scored text.
_CURVE_POINTS = 64
# Contexts in a batch at most, and bytes of keys and values that they may have on a CPU.
_MOST, _CPU_BYTES = {"cuda": 32, "cpu": 4}, 2 << 30


def run(
    model: Any,
    tokenizer: Tokenizer,
    cells: Sequence[tuple[Task, int, list[Sample]]],
    policies: Sequence[Policy],
    journal: Journal,
    batch: int | None = None,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> None:
    """Run what ``journal`` does not have yet and write it there, batch by batch.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        cells: tasks, lengths and their samples.
        policies: each on all of them.
        journal: of this run.
        batch: contexts at a time; by default as many as a part of the memory holds.
        progress: told how many samples have been finished under a policy, and what comes next.
    """
    for task, length, samples in cells:
        missing = {policy: {s.index for s in samples} - journal.done(task.name, length, policy) for policy in policies}
        left = sum(map(len, missing.values()))
        progress(len(policies) * len(samples) - left, f"{task.name} {length:,}")
        if not left:
            continue
        size = batch or _batch_size(model, length)
        session = Session(model, max_tokens=length + 1, batch_size=min(size, len(samples)))
        for group, tail in _batches(samples, size):
            wanted = [policy for policy in policies if missing[policy] & {sample.index for sample in group}]
            if not wanted:
                continue
            ids = torch.tensor([sample.ids for sample in group])
            session.read(ids[:, :-tail], policies=wanted)
            for policy in wanted:
                progress(0, f"{task.name} {length:,}: {policy.label()} {policy.budget or ''}")
                start = time.perf_counter()
                outcome = _outcome(session, policy, task, tokenizer, group, ids[:, -tail:])
                seconds = time.perf_counter() - start
                journal.add(
                    {
                        "task": task.name,
                        "metric": task.metric,
                        "length": length,
                        "policy": policy.name,
                        "label": policy.label(),
                        "budget": policy.budget,
                        "samples": outcome,
                        "usage": asdict(session.usage(policy)),
                        "seconds": seconds,
                    }
                )
                progress(len(missing[policy] & {sample.index for sample in group}), f"{task.name} {length:,}")


def _outcome(
    session: Session, policy: Policy, task: Task, tokenizer: Tokenizer, group: list[Sample], tail: Tensor
) -> list[dict[str, Any]]:
    if task.answer_tokens == 0:
        losses = -session.score(policy, tail).cpu()
        return [
            {"index": sample.index, "score": float(row.mean()), "curve": _curve(row, len(sample.ids) - len(row))}
            for sample, row in zip(group, losses, strict=True)
        ]
    answers = session.generate(policy, tail, task.answer_tokens, tokenizer.eos).tolist()
    texts = [tokenizer.decode(answer) for answer in answers]
    return [
        {
            "index": sample.index,
            "score": task.score(text, sample),
            "answer": text,
            "references": sample.references,
            "depth": sample.depth,
        }
        for sample, text in zip(group, texts, strict=True)
    ]


def _curve(losses: Tensor, first: int) -> list[tuple[int, float]]:
    """Mean losses of equal pieces of a text, each with the position of its middle."""
    size = max(1, len(losses) // _CURVE_POINTS)
    pieces = losses[: len(losses) // size * size].view(-1, size).mean(1).tolist()
    return [(first + i * size + size // 2, loss) for i, loss in enumerate(pieces)]


def _batches(samples: list[Sample], size: int) -> Iterator[tuple[list[Sample], int]]:
    """Batches of equally long prompts, and how many tokens at their end are decoded: the longest question's.

    A shorter question takes some of the text before it along. That number is one for all prompts of a length, so that
    a sample's result does not depend on the batch size.
    """
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[len(sample.ids)].append(sample)
    for group in groups.values():
        tail = min(max(sample.tail for sample in group), len(group[0].ids) - 1)
        for start in range(0, len(group), size):
            yield group[start : start + size], tail


def _batch_size(model: Any, length: int) -> int:
    config = model.config.get_text_config(decoder=True)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * attention_path.head_dim(config)
    device = model.device.type
    # The rest is for the prefill and for what the policies keep.
    memory = torch.cuda.mem_get_info()[0] // 4 if device == "cuda" else _CPU_BYTES
    return max(1, min(_MOST[device], memory // (token * model.dtype.itemsize * length)))
