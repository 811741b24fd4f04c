"""Writes the counts of tests that ran under sanitizers, from a JUnit report of each instruction set.

`make sanitize` calls it where QUEST_OPS_SANITIZE_OUT names a file. Instruction sets of the file that did not run now
keep their counts and their time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import torch


def counts(report: Path) -> dict[str, Any]:
    """Of a report, and the names of the tests that failed. There is no report where the process died."""
    if not report.exists():
        return {"passed": 0, "failed": ["the process died"]}
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    tests, failures, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    failed = [test.attrib for test in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in test}]
    return {
        "passed": tests - failures - errors - skipped,
        "failed": [f"{test['classname']}.{test['name']}" for test in failed],
        "skipped": skipped,
        "seconds": round(float(suite.attrib["time"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="that has the reports, ISA.xml each")
    parser.add_argument("isas", nargs="+")
    parser.add_argument("--sanitizers", required=True)
    parser.add_argument("--tests", required=True, help="pytest's arguments")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bounds = {name: int(os.environ[name]) for name in ("QUEST_OPS_TEST_EXAMPLES", "QUEST_OPS_FUZZ_CASES")}
    run = {"recorded": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "tests": options.tests}
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    kept = before["isas"] if before.get("sanitizers") == options.sanitizers else {}
    summary = {
        "command": "make sanitize",
        "sanitizers": options.sanitizers,
        **bounds,
        "device": platform.machine(),
        "torch": torch.__version__,
        "isas": kept | {isa: run | counts(options.folder / f"{isa}.xml") for isa in options.isas},
    }
    options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
