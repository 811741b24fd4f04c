"""The operators against their emulation in float64, on the bundled model: pages and answers.

    python bench/evaluation/emulation.py --device cuda --length 8192 --tries 32 --out results/emulation.json

Each decoded token of question and answer gives the emulation the same queries and keys in each sparse layer. Lists of
pages may differ where scores are the same to float32: such pages are counted, and any other difference is an error.
Then the emulation answers by itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from quest_eval import bundled_model, tasks
from quest_eval.decoding.observers import StepInfo
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.models import DTYPES, ByteTokenizer
from quest_eval.policies import make
from quest_eval.policies.emulation import QuestEmulation
from quest_eval.tasks.text import read_text
from torch import Tensor

POLICIES = {"quest-head": "none", "quest": "max", "quest-sum": "sum", "quest-soft": "soft"}
# Scores closer than this share of a list's largest are the same to float32.
TIE = 1e-5


class Comparison:
    """An observer that counts the pages in which the operators and the emulation differ."""

    def __init__(self, emulation: QuestEmulation) -> None:
        self._emulation = emulation
        self.lists = self.equal = self.ties = self.wrong = 0

    def __call__(self, layer: int, info: StepInfo) -> None:  # noqa: ARG002
        if info.pages is None:
            return
        mine = self._emulation.start(info.kv)
        mine.attend(info.q)
        chosen, differs = _mask(mine.pages, mine.scores), _mask(info.pages, mine.scores)
        differs ^= chosen
        worst = mine.scores.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
        tie = (mine.scores - worst).abs() <= TIE * mine.scores.abs().amax(-1, keepdim=True)
        self.lists += differs[..., 0].numel()
        self.equal += int((~differs.any(-1)).sum())
        self.ties += int((differs & tie).sum())
        self.wrong += int((differs & ~tie).sum())


def _mask(pages: Tensor, scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, pages.long(), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--length", type=int, default=8192, help="tokens, answer included (8192)")
    parser.add_argument("--tries", type=int, default=32, help="contexts (32)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256, 1024], help="tokens (64 256 1024)")
    parser.add_argument("--out", type=Path, default=Path("results/emulation.json"))
    options = parser.parse_args()

    tokenizer = ByteTokenizer()
    task = tasks.make("needles", tasks.Setup(tokenizer, read_text(None, tokenizer), options.tries))
    samples = task.samples(options.length)
    ids, tail = torch.tensor([sample.ids for sample in samples]), max(sample.tail for sample in samples)
    model = bundled_model.load(options.device, DTYPES[options.device])
    decoder = PolicyDecoder(model, max_tokens=options.length + 1, batch_size=len(samples))
    decoder.prefill(ids[:, :-tail], policies=[])
    rows = []
    for name, how in POLICIES.items():
        for budget in options.budgets:
            real, emulation = make(name, budget), QuestEmulation("emulation", budget, group_reduce=how)
            decoder.observer = comparison = Comparison(emulation)
            theirs = decoder.generate(real, ids[:, -tail:], task.answer_tokens)
            decoder.observer = None
            mine = decoder.generate(emulation, ids[:, -tail:], task.answer_tokens)
            row = {"policy": name, "budget": budget, "answers": len(theirs)}
            row["same_answers"] = int((theirs == mine).all(1).sum())
            row |= {key: value for key, value in vars(comparison).items() if key != "_emulation"}
            rows.append(row)
            print(row, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"device": options.device, "dtype": str(model.dtype), "length": options.length, "tie": TIE}
    options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if any(row["wrong"] for row in rows):
        raise SystemExit("the operators read pages that the emulation does not, and these are no ties")


if __name__ == "__main__":
    main()
