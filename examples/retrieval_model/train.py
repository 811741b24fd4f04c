"""Training: a plan of phases, the learning rates of its steps, and a report on progress."""

from __future__ import annotations

import argparse
import math
import time

import torch

from .device import CUDA, DEVICE
from .model import Model
from .muon import Muon


def parse_plan(text: str) -> list[str]:
    """Phases with their steps, as A:600,B:800 -> the phase of each step."""
    plan = []
    for item in text.split(","):
        phase, steps = item.split(":")
        plan += [phase] * int(steps)
    return plan


def train(model: Model, batches: torch.utils.data.DataLoader, plan: list[str], options: argparse.Namespace) -> None:
    matrices = [getattr(model, name) for name in Model.MATRICES]
    rest = [parameter for name, parameter in model.named_parameters() if name not in Model.MATRICES]
    muon = Muon(matrices)
    adam = torch.optim.Adam(rest, lr=options.adam_rate, betas=(0.9, 0.95), eps=1e-10, fused=CUDA)
    total, started, sums, counted = len(plan), time.time(), torch.zeros(2, device=DEVICE), 0
    for step, batch in enumerate(batches):
        text_loss, answer_loss = model.losses(batch.to_device())
        (text_loss + answer_loss).backward()
        # A short warm-up, a plateau, and a linear decay over the last 40 % of the steps.
        rate = min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (total - step) / (0.4 * total)))
        muon.step(options.muon_rate * rate, momentum=0.85 + 0.1 * min(1.0, step / 300), decay=0.01)
        for group in adam.param_groups:
            group["lr"] = options.adam_rate * rate
        adam.step()
        adam.zero_grad(set_to_none=True)
        sums += torch.stack([text_loss, answer_loss]).detach()
        counted += 1
        if (step + 1) % options.report_every == 0 or step + 1 == total:
            text_mean, answer_mean = (sums / counted).tolist()
            print(
                f"step {step + 1}/{total}, phase {plan[step]}, {time.time() - started:.0f} s: "
                f"text {text_mean / math.log(2):.3f} bits per byte, answers {answer_mean:.4f} nats",
                flush=True,
            )
            sums.zero_()
            counted = 0
