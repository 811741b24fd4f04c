"""Real texts of several genres that are on every machine on which this package runs, in a fixed order.

They depend on the versions of Python and of a few packages alone. A run notes a digest of each.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from .text import standard_library_files, standard_library_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: The most characters of a genre. Tokenising more costs time and adds little.
MOST = 1_000_000
# Packages that quest_eval depends on, directly or through torch and transformers.
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface_hub", "matplotlib", "rich")


def read(name: str) -> str:
    """The text of a genre, one of :data:`NAMES`."""
    return _GENRES[name]()[:MOST]


def _code() -> str:
    """The standard library's sources."""
    return standard_library_text(MOST).decode(errors="replace")


def _docstrings() -> str:
    """The docstrings of the standard library's modules, classes and functions, in the order of their files."""

    def texts() -> Iterator[str]:
        total = 0
        for path in standard_library_files():
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # files that test the parser
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 200:  # shorter ones say little outside their code
                        total += len(text)
                        yield text
            if total > MOST:
                return

    return "\n\n\n".join(texts())


def _manual() -> str:
    """The reference of the Python language, as ``help()`` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _licences() -> str:
    """The licences of torch and of all that it contains."""
    files = importlib.metadata.files("torch") or []
    wanted = (path for path in files if "LICENSE" in path.name.upper() or "NOTICE" in path.name.upper())
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(wanted))


def _readmes() -> str:
    """The pages with which packages introduce themselves."""
    return "\n\n".join(importlib.metadata.metadata(name)["Description"] or "" for name in _PACKAGES)


_GENRES: dict[str, Callable[[], str]] = {
    "code": _code,
    "docstrings": _docstrings,
    "manual": _manual,
    "licences": _licences,
    "readmes": _readmes,
}
#: The genres, in the order in which tries take them.
NAMES = tuple(_GENRES)
