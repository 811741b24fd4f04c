"""The figures of docs/reliability.md are those of the JSON files that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = " ".join((HERE.parents[1] / "docs" / "reliability.md").read_text().split())


def read(name: str) -> Any:
    return json.loads((HERE.parent / name).read_text())


def fuzzed() -> list[str]:
    summary = read("reliability/fuzz-cpu.json")
    total, minutes = f"{summary['cases']:,}", summary["minutes"]
    figures = []
    for mode in ("valid", "invalid", "corrupt"):
        refused, accepted = (
            sum(count for key, count in summary["counts"].items() if key.endswith(f" {mode} {outcome}"))
            for outcome in ("refused", "accepted")
        )
        cases = f"{refused + accepted:,} cases ({refused:,} refused, {accepted:,} accepted)"
        figures.append(f"mode {mode} | {cases} on an x86-64 CPU, of {total} in {minutes} minutes")
    assert summary["failed"] == 0
    return figures


def sanitized() -> list[str]:
    return [
        f"{isa}: {run['passed']:,} tests passed, {len(run['failed'])} failed, in {round(run['seconds'] / 60)} minutes"
        for isa, run in read("reliability/sanitize.json")["isas"].items()
    ]


def fuzzed_on_a_gpu() -> list[str]:
    summary = read("reliability/fuzz-cuda.json")
    return [f"{summary['cases']:,} cases in {summary['minutes']} minutes"]


def sanitized_on_a_gpu() -> list[str]:
    checks = dict(read("reliability/sanitize-gpu.json")["checks"])
    assert all(check["status"] == check["errors"] == 0 for check in checks.values())
    corrupt = checks.pop("corrupt")
    (cases,) = {check["cases"] for check in checks.values()} | {check["of"] for check in checks.values()}
    minutes = [f"{check['seconds'] / 60:.1f}" for check in checks.values()]
    each = f"{cases} cases each under {', '.join([*checks][:-1])} and {[*checks][-1]}, no error"
    calls = f"{corrupt['cases']} calls in {corrupt['seconds'] / 60:.1f} minutes, no error"
    return [f"{each}, in {', '.join(minutes[:-1])} and {minutes[-1]} minutes", calls]


def flipped() -> list[str]:
    checks = read("mutation/flip_checks.json")
    assert checks["killed"] + checks["explained"] == checks["tried"] == checks["mutants"]
    figure = f"{checks['mutants']} flips: {checks['killed']} killed, {checks['explained']} explained"
    return [f"{figure}; {checks['minutes']} minutes"]


def mutated() -> list[str]:
    files = [file for file in read("mutation/python.json").values() if isinstance(file, dict)]
    assert all(survivor["why"] for file in files for survivor in file["survivors"])
    keys = ("mutants", "tried", "killed", "minutes")
    made, tried, killed, minutes = (sum(file[key] for file in files) for key in keys)
    figure = f"a sample of {tried} of {made:,} mutants: {killed} killed, {tried - killed} explained"
    return [f"{figure}; {round(minutes)} minutes"]


def covered() -> list[str]:
    names = {"python": "Python", "cpp": "C++ for the CPU"}
    totals = {name: summary["files"]["total"] for name, summary in read("reliability/coverage.json").items()}
    return [
        f"{names[name]}: lines {total['lines_percent']} %, branches {total['branches_percent']} %"
        for name, total in totals.items()
    ]


@pytest.mark.parametrize("figures", [fuzzed, fuzzed_on_a_gpu, sanitized, sanitized_on_a_gpu, flipped, mutated, covered])
def test_figures_of_the_page(figures: Any) -> None:
    for figure in figures():
        assert figure in PAGE
