"""Mutation testing of the page account, the cache and the attention, by mutmut.

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

ROOT = Path(__file__).parents[2]
FILES = ("cache", "page_allocator", "attention")
#: The quick tests of these files. Tests of torch.compile would trace mutmut's own code.
TESTS = (
    "tests/cache/test_cache.py",
    "tests/cache/test_cache_failures.py",
    "tests/cache/test_cache_sharing.py",
    "tests/cache/test_bad_arguments.py",
    "tests/cache/test_attention.py",
    "tests/cache/test_selector.py",
)
CONFIG = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = [{only}]
do_not_mutate_patterns = ["raise ", "f\\""]
pytest_add_cli_args = ["-p", "helpers.other_library", "-p", "no:cacheprovider", "-k", "not cuda and not compile"]
pytest_add_cli_args_test_selection = [{tests}]
use_git_change_detection = false
timeout_constant = 20.0
timeout_multiplier = 5.0

[tool.pytest.ini_options]
pythonpath = ["src", "tests"]
markers = ["gpu: needs a GPU", "slow: is slow"]
"""


def prepare(folder: Path, files: list[str]) -> None:
    """The package, the tests and mutmut's settings in ``folder``."""
    shutil.copytree(ROOT / "python" / "quest_ops", folder / "src" / "quest_ops")
    for name in ("conftest.py", "helpers", "cache"):
        source = ROOT / "tests" / name
        (folder / "tests").mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "tests" / name)
    only = ", ".join(f'"src/quest_ops/{name}.py"' for name in files)
    (folder / "pyproject.toml").write_text(CONFIG.format(only=only, tests=", ".join(f'"{test}"' for test in TESTS)))


def run(folder: Path, *arguments: str) -> str:
    from quest_ops import _library

    library = _library._find("_C")
    assert library is not None
    environment = os.environ | {
        "PYTHONPATH": f"{folder}/mutants/tests",
        "QUEST_TEST_LIBRARY": str(library.parent),
        "QUEST_TEST_SOURCE": f"{folder}/mutants/src",
        "QUEST_OPS_TEST_EXAMPLES": "5",
        "CI": "1",  # the same examples in each run
    }
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--sample", type=int, help="mutants to try; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON for the summary")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        prepare(folder, options.files)
        print(run(folder, "run", "--max-children", str(options.jobs))[-2000:])
        print(run(folder, "results", "--all", "true"))


if __name__ == "__main__":
    main()
