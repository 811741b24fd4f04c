"""Fuzzes the operators for a while: random calls, judged by the reference.

    make fuzz ARGS="--minutes 60 --device cpu --jobs 2"

A case that fails is added to regressions.json, which the tests replay, and printed. So is the case during which a
process died. The last line is a JSON summary. The exit status is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from quest_ops._library import OPERATORS

from . import judge
from .campaign import run_job
from .plans import MODES, Plan

REGRESSIONS = Path(__file__).with_name("regressions.json")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cases", type=int, help="the most cases of each operator and mode")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", default=time.strftime("%Y%m%d%H%M%S"))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--replay", action="store_true", help="try the kept cases only")
    parser.add_argument("--out", type=Path, help="where the summary goes too")
    return parser.parse_args(arguments)


def replay(device: str) -> int:
    failed = 0
    for plan in json.loads(REGRESSIONS.read_text()):
        try:
            judge.run(plan, device)
        except Exception:  # noqa: PERF203
            traceback.print_exc()
            failed += 1
    return failed


def main() -> int:
    options = parse()
    if options.replay:
        return replay(options.device) > 0
    start, counts, found = time.monotonic(), Counter[str](), list[Plan]()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [context.Process(target=run_job, args=(options, job, folder)) for job in range(options.jobs)]
        for process in jobs:
            process.start()
        for job, process in enumerate(jobs):
            process.join()
            result = Path(folder, f"result-{job}.json")
            if result.exists():
                ours, theirs = json.loads(result.read_text())
                counts += Counter(ours)
                found += theirs
            else:
                plan = json.loads(Path(folder, f"current-{job}.json").read_text())
                print(f"process {job} died, exit status {process.exitcode}: {json.dumps(plan)}")
                found.append({**plan, "found": f"the process died with exit status {process.exitcode}"})
    if found:
        kept: list[Any] = json.loads(REGRESSIONS.read_text())
        REGRESSIONS.write_text(json.dumps(kept + found, indent=1) + "\n")
    summary = {
        "command": "make fuzz ARGS='" + " ".join(sys.argv[1:]) + "'",
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "isa": os.environ.get("QUEST_OPS_ISA", "best"),
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "cases": sum(counts.values()),
        "failed": len(found),
        "counts": dict(sorted(counts.items())),
    }
    text = json.dumps(summary, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
