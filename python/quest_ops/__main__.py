"""The command line: ``python -m quest_ops`` with ``demo``, ``eval``, ``advise`` or ``info``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .evaluation.command_line import add_commands
from .ops import PAGE_SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m quest_ops", description="Quest sparse attention for PyTorch.")
    commands = result.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed, and whether it fits together")
    demo = commands.add_parser(
        "demo",
        help="let a small language model find facts in a long text, densely and sparsely",
        description="Hides facts in a text, lets the bundled model read it, asks for them under dense attention, Quest "
        "and a window of recent tokens, prints the answers with times and bytes read, and draws the pages read.",
    )
    demo.add_argument("--text", type=Path, metavar="FILE", help="text to hide the facts in (the standard library)")
    demo.add_argument("--tokens", type=int, metavar="N", help="length of the text in bytes (16384; 32768 on a GPU)")
    demo.add_argument("--facts", type=int, default=8, metavar="N", help="how many facts to hide (8)")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (cpu)")
    demo.add_argument(
        "--budgets", type=int, nargs="+", default=[64, 256, 1024], metavar="N", help="tokens read, each (64 256 1024)"
    )
    demo.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=16, help="tokens a page (16)")
    demo.add_argument("--seed", type=int, default=0, help="of names, keys and depths (0)")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("results/demo"),
        metavar="DIR",
        help="for picture and JSON (results/demo)",
    )
    add_commands(commands)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "info":
        return _info()
    return _demo(options) if options.command == "demo" else _evaluate(options)


def _info() -> int:
    from .info import report

    rows = report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        import matplotlib as mpl  # noqa: F401
        import transformers  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        return _fail(f"the demo needs a package that is missing ({error}): run `pip install 'quest_ops[demo]'`")
    from .evaluation import demo

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    try:
        demo.run(
            demo.Options(
                text=options.text,
                tokens=options.tokens,
                facts=options.facts,
                device=options.device,
                budgets=tuple(options.budgets),
                page_size=options.page_size,
                seed=options.seed,
                out=options.out,
            ),
            console,
        )
    except (demo.DemoError, ImportError) as error:
        return _fail(str(error))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    try:
        import matplotlib as mpl  # noqa: F401
        import transformers  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        return _fail(f"the evaluation needs a package that is missing ({error}): run `pip install 'quest_ops[eval]'`")
    from .evaluation import command_line
    from .evaluation.errors import InputError

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    try:
        command_line.run(options, console)
    except (InputError, ImportError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"quest_ops: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
