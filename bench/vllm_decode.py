"""ms a decoding step of vLLM on the CPU, as it is and with Quest: `.venv-vllm/bin/python bench/vllm_decode.py`.

`make test-vllm` makes that environment. `--draw JSON` draws a run and prints its table, with any Python that has
matplotlib.

The model has random weights: a Qwen3 of 8 layers, width 512, 8 query and 2 KV heads of 128, in bfloat16. Prompts are
random tokens. One thread computes, and a time is that of the fastest step in which all requests decode, since other
programs ran on the machine. Each engine has a process of its own, and the two take turns at each length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTHS, BATCHES, BUDGET, BLOCK, LAYERS = (8192, 16384, 32768), (1, 4), 2048, 32, 8
STEPS = 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/vllm-decode.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # model, engine and length: a process of this run
    parser.add_argument("--draw", type=Path, help="draw the JSON of a run beside it, and measure nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        rows = json.loads(arguments.draw.read_text())["rows"]
        draw(rows, arguments.draw.with_suffix(".png"))
        print(table(rows))
        return
    if arguments.one:
        print("RESULT " + json.dumps(measure(*arguments.one[:2], int(arguments.one[2]))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        for length in arguments.lengths:
            for engine in ("stock", "quest"):
                command = [sys.executable, __file__, "--one", folder, engine, str(length)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                result = next(line for line in output.splitlines() if line.startswith("RESULT "))
                rows += json.loads(result.removeprefix("RESULT "))
                print(rows[-len(BATCHES) :], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "about": __doc__.split("\n\n")[2].replace("\n", " ").strip(), "budget": BUDGET}
    arguments.out.write_text(json.dumps({**result, "block_size": BLOCK, "rows": rows}, indent=1) + "\n")


def make_model(folder: str) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=40960,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def measure(model: str, engine: str, length: int) -> list[dict[str, Any]]:
    """The rows of one engine and length."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the same process, so that no message is measured
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    quest = {} if engine == "stock" else {"quest": {"budget": BUDGET}}
    most = length + STEPS + BLOCK * 2
    llm = LLM(
        model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=most, block_size=BLOCK,
        kv_cache_memory_bytes=int(1.1 * max(BATCHES) * most * LAYERS * 2 * 2 * 128 * 2), additional_config=quest,
    )  # fmt: skip
    draw = random.Random(0)
    prompts = [[draw.randrange(1024) for _ in range(length)] for _ in range(max(BATCHES))]

    params = SamplingParams(max_tokens=STEPS + 1, temperature=0, ignore_eos=True, detokenize=False)
    rows = []
    for batch in BATCHES:  # the prompts of the smaller batch stay in the prefix cache
        start = time.perf_counter()
        for i, prompt in enumerate(prompts[:batch]):
            llm.llm_engine.add_request(f"{batch}-{i}", {"prompt_token_ids": prompt}, params)
        counts: dict[str, int] = {}
        times = []
        while llm.llm_engine.has_unfinished_requests():
            decoding = len(counts) == batch and max(counts.values()) <= STEPS
            step = time.perf_counter()
            outputs = llm.llm_engine.step()
            if decoding and len(outputs) == batch:
                times.append((time.perf_counter() - step) * 1e3)
            elif not times:
                prefill = time.perf_counter() - start
            counts |= {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
        row = {"engine": engine, "length": length, "batch": batch, "median_ms": statistics.median(times)}
        rows.append({**row, "fastest_ms": min(times), "steps": len(times), "prefill_seconds": prefill})
    return rows


def machine() -> dict[str, Any]:
    import torch
    import vllm

    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    versions = {"torch": torch.__version__, "vllm": vllm.__version__, "python": platform.python_version()}
    return {"cpu": cpu.partition(": ")[2], "cores": os.cpu_count(), **versions}


def fastest(rows: list[dict[str, Any]], engine: str, batch: int, length: int) -> float:
    (row,) = (x for x in rows if (x["engine"], x["batch"], x["length"]) == (engine, batch, length))
    return row["fastest_ms"]


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/vllm.md."""
    lines = ["| context | batch | vLLM | with Quest | speed-up |", "| --- | --- | --- | --- | --- |"]
    for batch, length in sorted({(row["batch"], row["length"]) for row in rows}):
        stock, quest = (fastest(rows, engine, batch, length) for engine in ("stock", "quest"))
        times = f"{stock:.1f} ms | {quest:.1f} ms | {stock / quest:.1f}x"
        lines.append(f"| {length // 1024}K | {batch} | {times} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of both engines."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({row["length"] for row in rows})
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(9, 3.2), layout="constrained")
    for axis, batch in zip(axes, BATCHES, strict=True):
        for offset, (engine, colour) in enumerate((("stock", "#999999"), ("quest", "#0072B2"))):
            times = [fastest(rows, engine, batch, length) for length in lengths]
            bars = axis.bar([i + 0.4 * offset for i in range(len(lengths))], times, 0.38, color=colour)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
            axis.margins(y=0.12)
            bars.set_label({"stock": "vLLM", "quest": f"vLLM with Quest, {BUDGET} tokens"}[engine])
        axis.set_xticks([i + 0.2 for i in range(len(lengths))], [f"{length // 1024}K" for length in lengths])
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("tokens of context")
        axis.set_ylabel("ms a step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
