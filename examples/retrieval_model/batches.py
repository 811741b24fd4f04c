"""Batches: documents packed one behind the other."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .device import DEVICE
from .documents import Document, Source, repeat_document

#: Kind of document, its share of the tokens, and its length, log-uniform between two bounds.
PHASES = {
    "A": [
        ("dense", 0.45, 192, 512),
        ("repeat", 0.05, 128, 256),
        ("needle", 0.25, 256, 1024),
        ("text", 0.25, 1024, 1024),
    ],
    "B": [("dense", 0.25, 256, 1024), ("needle", 0.55, 512, 4096), ("text", 0.20, 2048, 4096)],
    "C": [
        ("dense", 0.15, 256, 1024),
        ("needle", 0.25, 1024, 4096),
        ("needle", 0.45, 8192, 8192),
        ("text", 0.15, 8192, 8192),
    ],
    "D": [
        ("dense", 0.08, 256, 1024),
        ("needle", 0.17, 1024, 8192),
        ("needle", 0.25, 16384, 16384),
        ("needle", 0.50, 32768, 32768),
    ],
}


@dataclass
class Batch:
    """Packed documents: inputs, targets, kinds of the targets and positions [N], and where each document starts."""

    inputs: Tensor
    targets: Tensor
    kinds: Tensor
    positions: Tensor
    starts: Tensor  # [documents + 1] int32
    longest: int

    def to_device(self) -> Batch:
        inputs, targets, kinds, positions, starts = (
            tensor.to(DEVICE, non_blocking=True)
            for tensor in (self.inputs, self.targets, self.kinds, self.positions, self.starts)
        )
        return Batch(inputs.long(), targets.long(), kinds, positions, starts, self.longest)

    def pin_memory(self) -> Batch:
        tensors = (self.inputs, self.targets, self.kinds, self.positions, self.starts)
        return Batch(*(tensor.pin_memory() for tensor in tensors), self.longest)


def log_uniform(rng: random.Random, low: float, high: float) -> int:
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def plan_documents(rng: random.Random, phase: str, tokens: int) -> list[tuple[str, int]]:
    """Kinds and lengths that fill ``tokens`` with the phase's shares, randomised at the margin."""
    jobs = []
    for kind, share, low, high in PHASES[phase]:
        wanted = share * tokens
        while wanted > 0:
            length = log_uniform(rng, low, high) if high > low else low
            if wanted < length and rng.random() > wanted / length:
                break
            jobs.append((kind, length))
            wanted -= length
    rng.shuffle(jobs)
    # Long ones first, so that a short one is cut at the end of the batch.
    jobs.sort(key=lambda job: -job[1] if job[1] >= 8192 else 0)
    return jobs


def make_document(rng: random.Random, source: Source, kind: str, length: int) -> Document:
    if kind == "dense":
        return source.dense_document(rng, length)
    if kind == "repeat":
        return repeat_document(rng, length)
    if kind == "needle":
        count = max(1, int(math.exp(rng.uniform(0, math.log(max(2, min(96, length // 110)))))))
        return source.needle_document(rng, length, count, at_end=rng.choice([0.0, 0.5, 1.0, 1.0]))
    return source.text_document(rng, length)


def make_batch(seed: int, source: Source, phase: str, tokens: int) -> Batch:
    rng = random.Random(seed)
    jobs = plan_documents(rng, phase, tokens)
    inputs, targets, kinds, positions, starts, left = [], [], [], [], [0], tokens
    while left > 0:
        kind, length = jobs.pop(0) if jobs else (PHASES[phase][0][0], rng.randint(256, 512))
        length = min(length, left)
        if left - length < 64:
            length = left
        # One byte more than the model reads: the last is a target only.
        content, kind_of = make_document(rng, source, kind if length >= 96 else "text", length + 1)
        inputs.append(content[:-1])
        targets.append(content[1:])
        kinds.append(kind_of[1:])
        positions.append(np.arange(length, dtype=np.int32))
        starts.append(starts[-1] + length)
        left -= length
    packed = (torch.from_numpy(np.concatenate(arrays)) for arrays in (inputs, targets, kinds, positions))
    return Batch(*packed, torch.tensor(starts, dtype=torch.int32), int(np.diff(starts).max()))


class Batches(torch.utils.data.IterableDataset):
    """A batch for each step of the plan, made by worker processes; each depends on the seed and its number alone."""

    def __init__(self, source: Source, plan: list[str], tokens: int, seed: int) -> None:
        self.source, self.plan, self.tokens, self.seed = source, plan, tokens, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            torch.set_num_threads(1)
        for step in range(first, len(self.plan), stride):
            yield make_batch(self.seed * 1_000_003 + step, self.source, self.plan[step], self.tokens)
