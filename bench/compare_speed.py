"""Compare the speed of two builds of quest_ops on one GPU.

    python bench/compare_speed.py OLD NEW [--rounds 3] [--out results/compare_speed.json] [options of kernels.py]

OLD and NEW are folders that hold python/quest_ops with _C.so and _C_cuda.so in it. bench/kernels.py of this checkout
measures both by turns, each time in a process of its own. A row's time is the median over the rounds. A row that is
over 3 % slower in NEW ends the command with 1. The read roofline depends on neither build: its ratio is the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).with_name("kernels.py")
TOLERANCE = 1.03
OPERATORS = ("append_kv", "estimate", "topk_pages", "sparse_decode", "four", "pipeline", "pages=None")
CONTROL = "limit"
LIBRARIES = ("_C.so", "_C_cuda.so")

# PathFinder goes first because an editable install's finder would take quest_ops from elsewhere.
LAUNCH = """
import importlib.machinery, os, runpy, sys
packages, script = sys.argv[1:3]
sys.meta_path.insert(0, importlib.machinery.PathFinder)
sys.path[:0] = [packages, os.path.dirname(script)]
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Row:
    """One operator in one workload; medians in microseconds, one a round."""

    workload: str
    operator: str
    old: list[float]
    new: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.new) / statistics.median(self.old)

    @property
    def slower(self) -> bool:
        return self.operator != CONTROL and self.ratio > TOLERANCE


def command(checkout: Path, script: Path, *options: str) -> list[str]:
    """A command that runs the script with the checkout's quest_ops, whatever is installed."""
    return [sys.executable, "-c", LAUNCH, str(checkout.resolve() / "python"), str(script.resolve()), *options]


def measure(checkout: Path, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        subprocess.run(
            command(checkout, KERNELS, "--no-peers", *options, "--out", str(out)), check=True, stdout=subprocess.DEVNULL
        )
        return json.loads(out.read_text())


def medians(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    rows = {f"topk_pages: {row['rows']} x {row['n']}, {row['k']}": row for row in result["topk"]}
    rows |= {row["workload"]["name"]: row for row in result["rows"]}
    return {
        (name, operator): row["microseconds"][operator]["median"]
        for name, row in rows.items()
        for operator in (*OPERATORS, CONTROL)
        if operator in row["microseconds"]
    }


def compare(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[Row]:
    """The rows of the rounds' results, one result of kernels.py each."""
    before, after = ([medians(result) for result in results] for results in (old, new))
    return [Row(*key, [x[key] for x in before], [x[key] for x in after]) for key in before[0]]


def print_rows(rows: list[Row]) -> None:
    width = max(len(row.workload) for row in rows)
    print(f"{'workload':{width}}  {'operator':13}  {'old us':>8}  {'new us':>8}  ratio")
    for row in rows:
        old, new = statistics.median(row.old), statistics.median(row.new)
        mark = "  slower" if row.slower else ""
        print(f"{row.workload:{width}}  {row.operator:13}  {old:8.2f}  {new:8.2f}  {row.ratio:.3f}{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/compare_speed.json"))
    options, kernel_options = parser.parse_known_args()
    checkouts = {"old": options.old, "new": options.new}
    for checkout in checkouts.values():
        for library in LIBRARIES:
            if not (path := checkout / "python" / "quest_ops" / library).is_file():
                parser.error(f"{path} is missing: build the checkout and copy its libraries there")

    results: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for i in range(options.rounds):
        for name in ("old", "new") if i % 2 == 0 else ("new", "old"):  # a drift of the clock favours neither
            results[name].append(measure(checkouts[name], kernel_options))
        rows = compare(**results)
        out = {"machine": results["old"][0]["machine"], "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
        options.out.write_text(json.dumps(out, indent=1))
    print_rows(rows)
    slower = sum(row.slower for row in rows)
    if slower:
        sys.exit(f"{slower} of {len(rows)} rows are over {TOLERANCE - 1:.0%} slower")


if __name__ == "__main__":
    main()
