"""ms a decoding step of vLLM on the CPU, as it is and with Quest: `.venv-vllm/bin/python bench/vllm_decode.py`.

`make test-vllm` makes that environment. `--draw JSON` draws a run and prints its table, with any Python that has
matplotlib.

The model has random weights: a Qwen3 of 8 layers, width 512, 8 query and 2 KV heads of 128, in bfloat16. Prompts are
random tokens. One thread computes, and a time is that of the fastest step in which all requests decode, since other
programs ran on the machine. Each engine has a process of its own. After the prompts, the two take turns of 8 steps, so
that other programs disturb both alike.
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
STEPS, TURN = 96, 8


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
        measure(*arguments.one[:2], int(arguments.one[2]))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        for length in arguments.lengths:
            engines = {
                engine: subprocess.Popen(
                    [sys.executable, __file__, "--one", folder, engine, str(length)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for engine in ("stock", "quest")
            }
            for batch in BATCHES:
                prefill = {engine: answer(process) for engine, process in engines.items()}
                times: dict[str, list[float]] = {"stock": [], "quest": []}
                for _ in range(STEPS // TURN):
                    for engine, process in engines.items():
                        process.stdin.write("turn\n")
                        process.stdin.flush()
                        times[engine] += answer(process)
                for engine, found in times.items():
                    row = {"engine": engine, "length": length, "batch": batch, "median_ms": statistics.median(found)}
                    rows.append(
                        {**row, "fastest_ms": min(found), "steps": len(found), "prefill_seconds": prefill[engine]}
                    )
                    print(rows[-1], flush=True)
            for process in engines.values():
                process.communicate()
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


def answer(process: subprocess.Popen[str]) -> Any:
    """The next answer of an engine's process; vLLM prints too."""
    for line in process.stdout:
        if line.startswith("ANSWER "):
            return json.loads(line.removeprefix("ANSWER "))
    raise RuntimeError("an engine's process has ended")


def measure(model: str, engine: str, length: int) -> None:
    """An engine's process: it answers with the seconds of a prefill, and with the ms of the steps of each turn."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the same process, so that no message is measured
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    quest = {} if engine == "stock" else {"quest": {"budget": BUDGET}}
    most = length + STEPS + BLOCK * 2
    llm = LLM(
        model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=most, block_size=BLOCK,
        kv_cache_memory_bytes=int(1.1 * max(BATCHES) * most * LAYERS * 2 * 2 * 128 * 2), additional_config=quest,
    ).llm_engine  # fmt: skip
    draw = random.Random(0)
    prompts = [[draw.randrange(1024) for _ in range(length)] for _ in range(max(BATCHES))]

    for batch in BATCHES:  # the prompts of the smaller batch stay in the prefix cache
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        names = [f"{batch}-{i}" for i in range(batch)]
        for name, prompt in zip(names, prompts, strict=False):
            llm.add_request(name, {"prompt_token_ids": prompt}, params)
        decoding: set[str] = set()
        while len(decoding) < batch:
            decoding |= {output.request_id for output in llm.step()}
        print("ANSWER", json.dumps(time.perf_counter() - start), flush=True)
        for _ in range(STEPS // TURN):
            sys.stdin.readline()
            times = []
            for _ in range(TURN):
                start = time.perf_counter()
                llm.step()
                times.append((time.perf_counter() - start) * 1e3)
            print("ANSWER", json.dumps(times), flush=True)
        llm.abort_request(names)


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
