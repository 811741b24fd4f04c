"""The command line: ``python -m quest_ops info`` and ``--version``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quest_ops", description="Quest sparse attention for PyTorch.")
    parser.add_argument("command", nargs="?", choices=["info"], help="versions, libraries and GPUs, and their match")
    parser.add_argument("--version", action="version", version=f"quest_ops {__version__}")
    if parser.parse_args(arguments).command is None:
        parser.print_help()
        return 0
    from .info import report

    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
