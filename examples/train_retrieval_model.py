"""Train the bundled model of quest_eval from scratch: about six minutes on one H100, a few steps on a CPU.

    python examples/train_retrieval_model.py --out model

Needs torch, numpy, transformers and safetensors, and nothing from the network: the text is the source code and
documentation found on this machine. The result is a stock transformers ``Qwen3ForCausalLM``; one token is one byte.

A small model learns to look facts up if three things come together: documents that are mostly lookup (facts and
questions, hardly any text), so that the mechanism forms within 300 steps; then needles in real text at growing lengths,
so that it is kept and reaches far; and a loss of its own for the answers' digits, which are few among many bytes.

Runs of one seed on one corpus see the same documents in the same order, whatever PYTHONHASHSEED is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from retrieval_model.attention import check_attention
from retrieval_model.batches import Batches
from retrieval_model.corpus import build_corpus, words_of
from retrieval_model.device import CUDA, DEVICE
from retrieval_model.documents import Source
from retrieval_model.judge import bits_per_byte, check_against_transformers, recall, shortest_length
from retrieval_model.model import Model
from retrieval_model.train import parse_plan, train

FACTS = (1, 8)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("model"), help="folder of the result (model)")
    parser.add_argument("--plan", default="A:600,B:800,C:2500,D:1500", help="phases and their steps")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a step (65536)")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of the matrices (0.02)")
    parser.add_argument("--adam-rate", type=float, default=4e-3, help="learning rate of the rest (4e-3)")
    parser.add_argument("--corpus-bytes", type=int, default=400_000_000, help="most text to train on (400e6)")
    parser.add_argument("--workers", type=int, default=12, help="processes that make documents (12)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and documents (0)")
    parser.add_argument("--report-every", type=int, default=200, help="steps between two lines of progress (200)")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192, 16384, 32768], help="to judge at")
    parser.add_argument("--questions", type=int, default=100, help="of each length and number of facts (100)")
    options = parser.parse_args()
    facts, shortest = max(FACTS), min(options.lengths, default=None)
    least = shortest_length(facts)
    if shortest is not None and shortest < least:
        parser.error(f"--lengths must be at least {least}, to hold {facts} facts and a question, got {shortest}")
    return options


def main() -> None:
    options = arguments()
    started = time.time()
    torch.manual_seed(options.seed)
    text, held_out_text = build_corpus(options.corpus_bytes)
    source, held_out = Source(text, words_of(text)), Source(held_out_text, [])
    sizes = f"{len(text) / 1e6:.0f} MB to train on, {len(held_out_text) / 1e6:.0f} MB held out"
    print(f"{sizes}, read in {time.time() - started:.0f} s", flush=True)
    plan = parse_plan(options.plan)
    batches = torch.utils.data.DataLoader(
        Batches(source, plan, options.tokens, options.seed + 1),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=CUDA,
        prefetch_factor=8 if options.workers else None,
    )
    if CUDA:
        torch.set_float32_matmul_precision("high")
        check_attention()
    model = Model(compiled=CUDA).to(DEVICE)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    train(model, batches, plan, options)

    model.set_compiled(False)
    model.save(options.out)
    with torch.no_grad():
        # What is judged is what was saved.
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    difference = check_against_transformers(model, options.out, held_out, 2048 if CUDA else 256)
    print(f"saved to {options.out}; logits differ from transformers' in float32 by {difference:.1e}", flush=True)
    for length in options.lengths:
        rates = [recall(model, held_out_text, length, facts, options.questions) for facts in FACTS]
        bits = bits_per_byte(model, held_out, length, max(1, min(64, 2**19 // length)))
        print(
            f"{length} tokens: {rates[0]:.2f} of 1 fact, {rates[1]:.2f} of 8 facts found; {bits:.3f} bits per byte",
            flush=True,
        )
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
