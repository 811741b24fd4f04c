"""One process of the fuzzer."""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from . import judge
from .plans import Plan, draw


def fuzz(options: argparse.Namespace, job: int, current: Path) -> tuple[Counter[str], list[Plan]]:
    """Cases number job, job + jobs, ... of the seed, until the time is over.

    Args:
        options: of the command line.
        job: number of this process.
        current: the file that holds the plan being tried.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    counts: Counter[str] = Counter()
    found: list[Plan] = []
    end, number = time.monotonic() + 60 * options.minutes, job
    while time.monotonic() < end and (options.cases is None or number < options.cases):
        for operator in options.operators:
            for mode in options.modes:
                plan = draw(f"{options.seed}-{number}", operator, mode)
                current.write_text(json.dumps(plan))
                try:
                    result = judge.run(plan, options.device)
                except Exception as error:
                    traceback.print_exc()
                    print(json.dumps(plan), flush=True)
                    result = "failed"
                    found.append({**plan, "found": traceback.format_exc(limit=-1).strip().splitlines()[-1][:200]})
                    if "CUDA error" in str(error):  # the process has lost the device
                        return counts, found
                counts[f"{operator} {mode} {result}"] += 1
        number += options.jobs
    return counts, found


def run_job(options: argparse.Namespace, job: int, folder: str) -> None:
    counts, found = fuzz(options, job, Path(folder, f"current-{job}.json"))
    Path(folder, f"result-{job}.json").write_text(json.dumps([counts, found]))
