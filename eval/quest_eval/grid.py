"""Runs the grid of task x length x policy x budget. A batch of contexts is prefilled once for all policies."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from . import models
from .decoding import attention_function
from .decoding.policy_decoder import PolicyDecoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from .decoding.prefill_store import PrefillStore
    from .models import Tokenizer
    from .policies import Policy
    from .results.journal import Journal
    from .tasks import Sample, Task

# Points of the curve of a scored text.
_CURVE_POINTS = 64
# Contexts in a batch at most, and bytes of keys and values that they may have on a CPU.
_MOST, _CPU_BYTES = {"cuda": 32, "cpu": 4}, 2 << 30


def run_grid(
    model: Any,
    tokenizer: Tokenizer,
    cells: Sequence[tuple[Task, int, list[Sample]]],
    policies: Sequence[Policy],
    journal: Journal,
    batch: int | None = None,
    store: PrefillStore | None = None,
    progress: Callable[[int, str], None] = lambda *_: None,
) -> None:
    """Run the samples that ``journal`` does not have yet, and write them there batch by batch.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        cells: tasks, lengths and their samples.
        policies: each on all of them.
        journal: of this run.
        batch: contexts at a time; by default as many as a share of the memory holds.
        store: keeps prefills for later runs; None: they are forgotten.
        progress: told the number of samples just finished under a policy, and the name of the next work.
    """
    fingerprint = "" if store is None else models.fingerprint(model)
    for task, length, samples in cells:
        missing = {policy: {s.index for s in samples} - journal.done(task.name, length, policy) for policy in policies}
        left = sum(map(len, missing.values()))
        progress(len(policies) * len(samples) - left, f"{task.name} {length:,}")
        if not left:
            continue
        size = batch or _batch_size(model, length)
        decoder = PolicyDecoder(
            model,
            max_tokens=length + 1,
            batch_size=min(size, len(samples)),
            store=store,
            fingerprint=fingerprint,
        )
        for group, tail in _batches(samples, size):
            wanted = [policy for policy in policies if missing[policy] & {sample.index for sample in group}]
            if not wanted:
                continue
            ids = torch.tensor([sample.ids for sample in group])
            decoder.prefill(ids[:, :-tail], policies=wanted)
            for policy in wanted:
                progress(0, f"{task.name} {length:,}: {policy.label()} {policy.budget or ''}")
                start = time.perf_counter()
                outcome = _outcome(decoder, policy, task, tokenizer, group, ids[:, -tail:])
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
                        "usage": asdict(decoder.usage(policy)),
                        "seconds": seconds,
                    }
                )
                progress(len(missing[policy] & {sample.index for sample in group}), f"{task.name} {length:,}")


def _outcome(
    decoder: PolicyDecoder, policy: Policy, task: Task, tokenizer: Tokenizer, group: list[Sample], tail: Tensor
) -> list[dict[str, Any]]:
    if task.answer_tokens == 0:
        losses = -decoder.score(policy, tail).cpu()
        return [
            {
                "index": sample.index,
                "score": float(row.mean()),
                "curve": _curve(row, len(sample.ids) - len(row)),
                "genre": sample.genre,
            }
            for sample, row in zip(group, losses, strict=True)
        ]
    answers = decoder.generate(policy, tail, task.answer_tokens, tokenizer.eos).tolist()
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
    """Mean losses of equal sections of a text, each with the position of its middle."""
    size = max(1, len(losses) // _CURVE_POINTS)
    sections = losses[: len(losses) // size * size].view(-1, size).mean(1).tolist()
    return [(first + i * size + size // 2, loss) for i, loss in enumerate(sections)]


def _batches(samples: list[Sample], size: int) -> Iterator[tuple[list[Sample], int]]:
    """Batches of equally long prompts, and the number of tokens at their end that are decoded: the longest question's.

    A shorter question takes some tokens of the text before it along. All prompts of a length share that number, so that
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
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * attention_function.head_dim(config)
    device = model.device.type
    # The rest is for the prefill and for the policies' own tensors.
    memory = torch.cuda.mem_get_info()[0] // 4 if device == "cuda" else _CPU_BYTES
    return max(1, min(_MOST[device], memory // (token * model.dtype.itemsize * length)))
