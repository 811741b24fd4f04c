"""Tests run on a library of another build: QUEST_TEST_LIBRARY names its folder.

PYTHONPATH=tests QUEST_TEST_LIBRARY=build/coverage python -m pytest -p helpers.other_library
"""

from __future__ import annotations

import importlib.resources
import os
import sys
from pathlib import Path


def use_library(folder: Path) -> None:
    """Let the next import of quest_ops load the libraries of ``folder``."""
    files = importlib.resources.files
    importlib.resources.files = lambda package=None: folder if package == "quest_ops" else files(package)


if "QUEST_TEST_LIBRARY" in os.environ:
    use_library(Path(os.environ["QUEST_TEST_LIBRARY"]).resolve())

if "QUEST_TEST_SOURCE" in os.environ:
    # An editable install would import its own source.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, os.environ["QUEST_TEST_SOURCE"])
