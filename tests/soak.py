"""Decodes for long over one cache, with random appends, crops, forks, frees and resets between the steps.

    make soak ARGS="--steps 100000 --device cuda --out tests/reliability/soak-cuda.json"

On CUDA the layers of a step are a CUDA graph that is captured once. The same calls are made twice. The bits of all
outputs must be equal, every output finite though freed pages hold NaN, and the memory in use must not grow. The exit
status is 1 where one of these fails. The summary is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quest_ops import CacheFullError, PagedKVCache, QuestConfig, quest_attention
from torch import Tensor

L, B, HKV, GROUP, D, S, MAX_TOKENS = 2, 4, 2, 2, 64, 8, 256
CONFIG = QuestConfig(budget=6 * S, page_size=S, dense_layers=1)
SAMPLES = 50  # of the memory in use
MOST_GROWTH = 8 * 2**20  # bytes of the process after its first tenth; the allocator of the C library is not exact


class Soak:
    """One cache, its step, and a digest of all outputs so far.

    Args:
        device: of the cache.
        seed: of the calls and of the tokens.
    """

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.calls, self.random = device, Counter[str](), random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        # Less than all sequences at their longest, so that the pool runs full.
        sizes = {"max_tokens": MAX_TOKENS, "batch_size": B, "page_size": S, "num_pages": 3 * MAX_TOKENS // S}
        self.cache = PagedKVCache(L, HKV, D, **sizes, poison_freed=True, device=device)
        self.new = [
            torch.zeros(L, B, heads, D, dtype=torch.bfloat16, device=device) for heads in (GROUP * HKV, HKV, HKV)
        ]
        weights = torch.arange(1, 2 * L * B * GROUP * HKV * D, 2, device=device)
        self.weights = weights.view(L, B, GROUP * HKV, D)
        self.digest, self.not_finite = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.layers = self._captured() if device == "cuda" else self._layers

    def _layers(self) -> Tensor:
        q, k, v = self.new
        outs = [quest_attention(q[i], k[i], v[i], self.cache, i, CONFIG) for i in range(L)]
        return torch.stack(outs)

    def _captured(self) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.cache.advance(1)
            self._layers()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.cache.advance(1)
        with torch.cuda.graph(graph):
            out = self._layers()
        self.cache.reset()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def step(self) -> None:
        """One token for each sequence, after a random call now and then."""
        if self.random.random() < 0.1:
            self._disturb()
        for b, length in enumerate(self.cache.lengths):
            if length + 1 > MAX_TOKENS:
                self.cache.crop(self.random.randrange(MAX_TOKENS // 2), b)
                self.calls["crop at the longest"] += 1
        while True:
            try:
                self.cache.advance(1)
                break
            except CacheFullError:
                self.cache.free(self.random.randrange(B))
                self.calls["free of a full pool"] += 1
        for x in self.new:
            x.normal_(generator=self.generator)
        out = self.layers()
        self.calls["decode step"] += 1
        # Integers wrap around, so the sum does not depend on its order.
        bits = (out.view(torch.int16).long() * self.weights).sum()
        self.digest.mul_(6364136223846793005).add_(bits)
        self.not_finite.add_((~out.isfinite()).sum())

    def _disturb(self) -> None:
        r = self.random
        call = r.choices(("append", "crop", "fork", "free", "reserve", "reset"), (40, 25, 20, 8, 6, 1))[0]
        b = r.randrange(B)
        try:
            if call == "append":
                lens = [r.choice((0, 0, 1, 5, 24)) for _ in range(B)]
                T = max(1, *lens)
                self.cache.advance(T, lens)
                k = torch.randn(L, B, T, HKV, D, generator=self.generator, device=self.device).bfloat16()
                for layer in range(L):
                    self.cache.append(layer, k[layer], -k[layer])
            elif call == "crop":
                self.cache.crop(r.randrange(MAX_TOKENS), r.choice((b, b, b, None)))
            elif call == "fork":
                self.cache.fork(b, (b + r.randint(1, B - 1)) % B)
            elif call == "free":
                self.cache.free(b)
            elif call == "reserve":
                self.cache.reserve(r.randrange(20), b)
            else:
                self.cache.reset()
        except CacheFullError:
            call += " refused: full"
        self.calls[call] += 1


def memory_in_use(device: str) -> int:
    """Bytes: of tensors on CUDA, of the whole process on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(steps: int, device: str, seed: int) -> dict[str, Any]:
    """The calls of a seed: their numbers, the digest of the outputs, and samples of the memory in use."""
    soak, memory, start = Soak(device, seed), [], time.monotonic()
    with torch.no_grad():
        for number in range(steps):
            soak.step()
            if number % max(1, steps // SAMPLES) == 0:
                memory.append(memory_in_use(device))
    memory.append(memory_in_use(device))
    return {
        "calls": dict(sorted(soak.calls.items())),
        "digest": f"{soak.digest.item() % 2**64:016x}",
        "outputs_not_finite": int(soak.not_finite),
        "memory": memory,
        "minutes": round((time.monotonic() - start) / 60, 2),
    }


def judge(runs: list[dict[str, Any]], device: str) -> list[str]:
    """The promises that did not hold."""
    broken = []
    if len({each["digest"] for each in runs}) > 1:
        broken.append("a rerun gave other bits")
    if any(each["outputs_not_finite"] for each in runs):
        broken.append("outputs were not finite: a freed page was read")
    for each in runs:
        memory = each["memory"]
        early = max(memory[: max(2, len(memory) // 10)])
        if max(memory) - early > (0 if device == "cuda" else MOST_GROWTH):
            broken.append(f"memory grew by {max(memory) - early} bytes")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(options.steps, options.device, options.seed) for _ in range(2)]
    broken = judge(runs, options.device)
    summary = {
        "command": "make soak ARGS='" + " ".join(sys.argv[1:]) + "'",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "cuda_graph": options.device == "cuda",
        "steps_of_a_run": options.steps,
        "broken": broken,
        "runs": runs,
    }
    text = json.dumps(summary, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
