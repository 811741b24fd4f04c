"""Writes and prints the share of lines and branches that tests ran, from a report of coverage.py or of gcovr.

`make coverage` calls it, once for each language. The counts of the other language stay as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Counts = dict[str, int]


def of_python(report: dict[str, Any]) -> dict[str, Counts]:
    """Counts of each file in a report of `coverage json`."""
    names = {"lines": "num_statements", "lines_run": "covered_lines"}
    names |= {"branches": "num_branches", "branches_run": "covered_branches"}
    return {
        file.removeprefix("python/"): {key: entry["summary"][name] for key, name in names.items()}
        for file, entry in report["files"].items()
    }


def of_cpp(report: dict[str, Any]) -> dict[str, Counts]:
    """Counts of each file in a report of `gcovr --json-summary`."""
    names = {"lines": "line_total", "lines_run": "line_covered"}
    names |= {"branches": "branch_total", "branches_run": "branch_covered"}
    return {entry["filename"]: {key: entry[name] for key, name in names.items()} for entry in report["files"]}


LANGUAGES = {"python": of_python, "cpp": of_cpp}


def percent(counts: Counts, kind: str) -> float:
    return round(100 * counts[f"{kind}_run"] / counts[kind], 1) if counts[kind] else 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("language", choices=LANGUAGES)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", required=True, help="that made the report")
    options = parser.parse_args()
    files = LANGUAGES[options.language](json.loads(options.report.read_text()))
    keys = ("lines", "lines_run", "branches", "branches_run")
    files["total"] = {key: sum(counts[key] for counts in files.values()) for key in keys}
    for name, counts in files.items():
        print(f"{name:50} lines {percent(counts, 'lines'):5} %  branches {percent(counts, 'branches'):5} %")
    rows = {
        name: counts | {"lines_percent": percent(counts, "lines"), "branches_percent": percent(counts, "branches")}
        for name, counts in files.items()
    }
    summary = json.loads(options.out.read_text()) if options.out.exists() else {}
    summary[options.language] = {"command": options.command, "files": rows}
    options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
