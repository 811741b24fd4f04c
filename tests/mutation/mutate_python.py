"""Mutation testing of the page account, the cache, the settings and the attention, by mutmut.

mutmut changes a copy of the package in a folder of its own. The tests there import that copy, and the compiled library
of the installed package.

    python tests/mutation/mutate_python.py --out tests/mutation/python.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: The quick tests of each file.
TESTS = {
    "page_allocator": ("test_cache.py", "test_cache_sharing.py"),
    "cache": (
        "test_cache.py",
        "test_cache_sharing.py",
        "test_cache_failures.py",
        "test_bad_arguments.py",
        "test_candidates.py",
        "test_reselect_every.py",
    ),
    "config": (
        "test_bad_arguments.py",
        "test_layer_budgets.py",
        "test_dense_below.py",
        "test_candidates.py",
        "test_config_file.py",
        "test_reselect_every.py",
    ),
    "attention": (
        "test_attention.py",
        "test_selector.py",
        "test_report.py",
        "test_bad_arguments.py",
        "test_layer_budgets.py",
        "test_dense_below.py",
        "test_candidates.py",
        "test_reselect_every.py",
    ),
}
#: Tests of torch.compile would trace mutmut's own code.
#: dtype1, dtype2 and int8 are other kinds of the same tests; the last two compile without the word in their names.
WORDS = (
    "not cuda and not compile and not dtype1 and not dtype2 and not int8 "
    "and not moved_unseen and not sync_lengths_that_fails"
)
CONFIG = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = [{only}]
do_not_mutate_patterns = ["raise ", "f\\""]
pytest_add_cli_args = ["-p", "helpers.other_library", "-p", "no:cacheprovider", "-k", "{words}"]
pytest_add_cli_args_test_selection = [{tests}]
use_git_change_detection = false
timeout_constant = 20.0
timeout_multiplier = 5.0

[tool.pytest.ini_options]
pythonpath = ["src", "tests"]
markers = ["gpu: needs a GPU", "slow: is slow"]
"""


def prepare(folder: Path, file: str) -> None:
    """The package, the tests and mutmut's settings in ``folder``."""
    shutil.copytree(ROOT / "python" / "quest_ops", folder / "src" / "quest_ops")
    (folder / "tests").mkdir()
    for name in ("helpers", "cache"):
        shutil.copytree(ROOT / "tests" / name, folder / "tests" / name)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    tests = ", ".join(f'"tests/cache/{test}"' for test in TESTS[file])
    (folder / "pyproject.toml").write_text(CONFIG.format(only=f'"src/quest_ops/{file}.py"', tests=tests, words=WORDS))


def mutmut(folder: Path, *arguments: str) -> str:
    from quest_ops import _library

    library = _library._find("_C")
    assert library is not None
    environment = os.environ | {
        "PYTHONPATH": str(folder / "tests"),
        "QUEST_TEST_LIBRARY": str(library.parent),
        "QUEST_TEST_SOURCE": str(folder / "mutants" / "src"),
        "QUEST_OPS_TEST_EXAMPLES": "3",
        "CI": "1",  # the same examples in each run
    }
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = done.returncode != 0 and "nothing matches" not in done.stderr
    if failed or "failed to collect stats" in done.stdout:
        raise SystemExit(done.stdout[-2000:] + done.stderr)
    return done.stdout


def names_of_mutants(folder: Path) -> dict[str, str]:
    """Every mutant and its outcome."""
    lines = mutmut(folder, "results", "--all", "true").splitlines()
    return dict(line.strip().split(": ") for line in lines if ": " in line)


def change(folder: Path, mutant: str) -> list[str]:
    """The lines that a mutant takes out and puts in."""
    lines = mutmut(folder, "show", mutant).splitlines()
    return [line for line in lines if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")]


def try_file(folder: Path, file: str, options: argparse.Namespace) -> dict[str, Any]:
    prepare(folder, file)
    started = time.monotonic()
    mutmut(folder, "run", "--max-children", "1", "no such mutant")  # makes them all, and tries none
    names = sorted(names_of_mutants(folder))
    chosen = names
    if options.sample is not None and options.sample < len(names):
        chosen = sorted(random.Random(options.seed).sample(names, options.sample))
    mutmut(folder, "run", "--max-children", str(options.jobs), *chosen)
    found = names_of_mutants(folder)
    outcomes = Counter(found[name] for name in chosen)
    explained = json.loads((Path(__file__).parent / "python_explained.json").read_text())
    survivors = []
    for name in chosen:
        if found[name] == "survived":
            lines = change(folder, name)
            why = explained.get(" ".join(line.strip() for line in lines))
            survivors.append({"mutant": name, "change": lines, "why": why})
            print("survived", name, *lines, sep="\n  ", flush=True)
    return {
        "mutants": len(names),
        "tried": len(chosen),
        **outcomes,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "survivors": survivors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=int, help="mutants to try in each file; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON for the summary")
    options = parser.parse_args()
    summary: dict[str, Any] = {"command": " ".join(["python", "tests/mutation/mutate_python.py", *sys.argv[1:]])}
    for file in options.files:
        with tempfile.TemporaryDirectory() as folder:
            summary[file] = try_file(Path(folder).resolve(), file, options)
        counts = {key: value for key, value in summary[file].items() if key != "survivors"}
        print(file, counts, flush=True)
        if options.out:
            options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
