"""Milliseconds a token of ``generate()`` in transformers, by dense attention and by Quest.

    python bench/transformers_generate.py [--prompt 32768] [--tokens 64] [--only TEXT ...] [--out FILE]

The model has the shape of Llama-3.1-8B, random weights in bfloat16, and a prompt of random tokens. Each way runs once
to compile and to load kernels, then timed, several times. A streamer notes the time of each token. The first one's
holds the prefill. Milliseconds a token are the median between successive tokens of all runs, without the first eight
of a run, in which PyTorch records its CUDA graphs. Where a selection serves several steps, each figure is the mean of
as many. The host's part of a token changes between runs, so the JSON has the median of each.

Writes a JSON. Without a GPU, a tiny model runs, and the ways that compile are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hardware import default_path, machine
from quest_ops import QuestConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from workloads import named

# transformers would take bench/kernels.py for the package "kernels".
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
import transformers  # noqa: E402
from quest_ops.transformers import disable_quest, enable_quest  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.utils import is_flash_attn_2_available  # noqa: E402

SKIPPED = 8  # intervals before those that count
RUNS = 3  # of a way, that are timed
PAPER = QuestConfig(bounds="cache", std_factor=None, sink_pages=0)
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # no token ends the text
MODELS = {
    "cuda": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "cpu": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
}


@dataclass(frozen=True)
class Way:
    """How ``generate`` runs: the attention implementation, Quest's configuration if any, and further arguments."""

    name: str
    attention: str = "sdpa"
    quest: QuestConfig | None = None
    arguments: tuple[tuple[str, Any], ...] = (("disable_compile", True),)

    @property
    def compiled(self) -> bool:
        return ("disable_compile", True) not in self.arguments


STATIC = ("cache_implementation", "static")
WAYS = [
    Way("sdpa, dynamic cache"),
    Way("sdpa, static cache, compiled", arguments=(STATIC,)),
    Way("flash_attention_2, dynamic cache", attention="flash_attention_2"),
    Way("quest, eager", quest=QuestConfig()),
    Way("quest, compiled", quest=QuestConfig(), arguments=()),
    Way("quest, the paper's, compiled", quest=PAPER, arguments=()),
    Way(
        "quest, no dense layers, a selection for 4 steps, compiled",
        quest=QuestConfig(dense_layers=0, reselect_every=4),
        arguments=(),
    ),
]


class Clock(BaseStreamer):
    """Notes the time at which each token comes; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002 - only its time counts
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def new_model(device: str) -> Any:
    config = LlamaConfig(**MODELS[device], **SPECIAL, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(model: Any, way: Way, prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Seconds to the first token, milliseconds between tokens, and the memory of one way."""
    cache, on_gpu = None, model.device.type == "cuda"
    if way.quest:
        cache = enable_quest(model, way.quest, max_tokens=prompt.shape[1] + new_tokens)
    else:
        model.set_attn_implementation(way.attention)

    def generate() -> tuple[float, list[float], list[int]]:
        clock, start = Clock(), time.perf_counter()
        arguments = {"max_new_tokens": new_tokens, "do_sample": False, **dict(way.arguments)}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **arguments)
        _, first, *rest = clock.times
        return first - start, [1e3 * (b - a) for a, b in pairwise([first, *rest])], out[0, prompt.shape[1] :].tolist()

    try:
        generate()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        timed = [generate() for _ in range(RUNS)]
    finally:
        if cache is not None:
            sparse = sum(path == "sparse" for _, path, _ in cache.plan())
            disable_quest(model)
    period = way.quest.reselect_every if way.quest else 1
    means = [
        [statistics.fmean(times[i : i + period]) for i in range(SKIPPED, len(times) - period + 1, period)]
        for _, times, _ in timed
    ]
    low, median, high = statistics.quantiles([mean for run in means for mean in run], n=4)
    first, tokens = statistics.median(first for first, *_ in timed), timed[-1][2]
    found = {"name": way.name, "first_token_seconds": first, "tokens": len(tokens), "distinct_tokens": len(set(tokens))}
    found["milliseconds"] = {"median": median, "low": low, "high": high, "runs": [*map(statistics.median, means)]}
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if cache is not None:
        found |= {"budget": way.quest.budget, "sparse_layers": sparse}
    return found


def forget(model: Any) -> None:
    """Drop compiled code, its CUDA graphs and caches, so that the next way starts as in a process of its own."""
    for name in ("_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def runs(way: Way, device: str) -> bool:
    """Whether a way can run here; a line says why not."""
    if way.compiled and device == "cpu":
        print(f"{way.name}: left out, since transformers compiles by itself on GPUs alone")
        return False
    if way.attention.startswith("flash") and not is_flash_attn_2_available():
        print(f"{way.name}: left out, since the package flash_attn is not installed")
        return False
    return True


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table("generate()", "first token, s", "ms a token", "peak, GB", "sparse layers")
    for row in rows:
        ms = row["milliseconds"]
        memory = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "-"
        spread = f"{ms['median']:.2f} ({ms['low']:.2f}-{ms['high']:.2f})"
        table.add_row(
            row["name"], f"{row['first_token_seconds']:.2f}", spread, memory, str(row.get("sparse_layers", "-"))
        )
    Console(width=120).print(table)


def guarded(make: Callable[[], dict[str, Any]], name: str) -> dict[str, Any] | None:
    """A way's figures, or None and a line where the GPU's memory does not hold it."""
    try:
        return make()
    except torch.OutOfMemoryError as error:
        print(f"{name}: skipped, out of memory: {str(error).splitlines()[0]}")
        return None


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=32768 if device == "cuda" else 4096, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only ways of this name, or with TEXT in it")
    parser.add_argument("--out", type=Path, default=default_path("generate", device))
    options = parser.parse_args()
    if options.tokens < SKIPPED + 3:
        parser.error(f"--tokens must be at least {SKIPPED + 3}, got {options.tokens}")
    ways = WAYS
    if options.only:
        try:
            wanted = named([way.name for way in WAYS], options.only)
        except ValueError as error:
            parser.error(str(error))
        ways = [way for way in WAYS if way.name in wanted]

    model = new_model(device)
    prompt = torch.randint(1, MODELS[device]["vocab_size"], (1, options.prompt), device=device)
    result: dict[str, Any] = {"machine": {**machine(device), "transformers": transformers.__version__}}
    result |= {"model": MODELS[device], "dtype": "bfloat16", "prompt": options.prompt, "rows": []}
    for way in ways:
        if not runs(way, device):
            continue
        forget(model)
        if row := guarded(lambda way=way: measure(model, way, prompt, options.tokens), way.name):
            print(f"{way.name}: {row['milliseconds']['median']:.2f} ms a token", flush=True)
            result["rows"].append(row)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_rows(result["rows"])
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
