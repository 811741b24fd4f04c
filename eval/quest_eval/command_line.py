"""The command line: ``quest-eval demo``, ``run`` and ``advise``."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import policies, tasks
from .errors import InputError
from .library import PAGE_SIZES
from .tasks import genres

if TYPE_CHECKING:
    from collections.abc import Sequence


#: The policies of ``quest-eval run`` where none are named.
DEFAULT_POLICIES = ("dense", "quest", "quest-head", "h2o", "tova", "streaming", "page-oracle")


def parser() -> argparse.ArgumentParser:
    # Defaults are those of the commands' Options: arguments that are not given stay None, and are left out.
    result = argparse.ArgumentParser(prog="quest-eval", description="Accuracy of Quest and other sparse attention.")
    result.add_argument("--version", action="version", version=f"quest_eval {metadata.version('quest_eval')}")
    commands = result.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="let a small language model find facts in a long text, densely and sparsely",
        description="Hides facts in a text, lets the bundled model read it, asks for them under dense attention, Quest "
        "and a window of recent tokens, prints the answers with times and bytes read, and plots the pages read.",
    )
    demo.add_argument("--tokens", type=int, metavar="N", help="length of the text in bytes (16384; 32768 on a GPU)")
    demo.add_argument("--facts", type=int, metavar="N", help="number of facts to hide (8)")
    known = "\n".join(f"  {name:13} {description}" for name, description in policies.NAMES.items())
    known += "\n  quest-config,file=FILE.json  Quest as a saved QuestConfig has it"
    about_policies: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "epilog": f"policies, each with fields behind it or not (quest,sink_pages=1):\n{known}",
    }
    run = commands.add_parser(
        "run", help="the accuracy that policies keep of a model's, by task, length and budget", **about_policies
    )
    run.add_argument("tasks", nargs="+", choices=tasks.NAMES, metavar="TASK", help=", ".join(tasks.NAMES))
    run.add_argument("--policies", nargs="+", metavar="NAME", help=f"see below ({' '.join(DEFAULT_POLICIES)})")
    run.add_argument(
        "--policy", action="append", metavar="MODULE:CLASS", help="a policy of your own beside them; may be repeated"
    )
    run.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens, answer included (2048)")
    run.add_argument("--tries", type=int, metavar="N", help="samples a cell (20)")
    run.add_argument("--data", type=Path, metavar="DIR", help="files of LongBench or PG19 (the hub)")
    run.add_argument("--depths", type=float, nargs="+", metavar="D", help="of the fact, 0 to 1 (10 of them)")
    run.add_argument("--needles", type=int, metavar="N", help="facts in a text of the task needles (8)")
    run.add_argument("--scored", type=int, metavar="N", help="tokens that perplexity, loss and pg19 decode (256)")
    run.add_argument(
        "--genres", nargs="+", choices=genres.NAMES, metavar="NAME", help=f"{', '.join(genres.NAMES)}; of loss"
    )
    run.add_argument("--batch", type=int, metavar="N", help="contexts at a time (all that fit)")
    run.add_argument("--chat", action="store_true", default=None, help="use the model's chat template")
    advise = commands.add_parser(
        "advise", help="the budget that a model needs on your text, and what each one keeps", **about_policies
    )
    advise.add_argument(
        "--criterion",
        choices=("mass", "perplexity"),
        help="attention mass in every layer, or perplexity over dense (mass)",
    )
    advise.add_argument(
        "--target", type=float, metavar="X", help="least mass (0.99), or most perplexity over dense attention's (1.01)"
    )
    advise.add_argument("--policy", metavar="NAME", help="a name, with fields or not, or MODULE:CLASS (quest-default)")
    advise.add_argument("--length", type=int, metavar="N", help="tokens of the text (4096)")
    advise.add_argument("--tokens", type=int, metavar="N", help="decoded tokens that are measured (64)")
    advise.add_argument(
        "--keep",
        type=float,
        metavar="X",
        help="seek a budget for each layer, with perplexity at most this share above dense (0.01)",
    )
    advise.add_argument("--evaluations", type=int, metavar="N", help="budget lists that --keep may try (24)")
    for command in (run, advise):
        command.add_argument(
            "--model", metavar="NAME", help="smollm2, a .gguf, a folder or a name on the hub (bundled)"
        )
        command.add_argument("--prefills", type=float, metavar="GIB", help="kept on disk for later runs (8; cuda: 0)")
        command.add_argument("--dense-layers", type=int, metavar="N", help="first layers that read everything (2)")
    three = "64 256 1024"
    for command, name, budgets in (
        (demo, "demo", three),
        (run, "run", three),
        (advise, "advise", "64 128 256 512 1024 2048"),
    ):
        command.add_argument(
            "--budgets", type=int, nargs="+", metavar="N", help=f"tokens a head attends to ({budgets})"
        )
        command.add_argument("--text", type=Path, metavar="FILE", help="a long text (the standard library)")
        command.add_argument("--device", choices=("cpu", "cuda"), help="the device to run on (cpu)")
        to_file = "; FILE.json: for the configuration of --keep" if name == "advise" else ""
        command.add_argument("--out", type=Path, metavar="DIR", help=f"for results (results/{name}){to_file}")
        command.add_argument("--page-size", type=int, choices=PAGE_SIZES, help="tokens a page (16)")
        command.add_argument("--seed", type=int, metavar="N", help="of names, keys, places and windows (0)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for bad input."""
    options = parser().parse_args(arguments)
    try:
        _run(options)
    except (InputError, ImportError) as error:
        print(f"quest-eval: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    # The commands import these at once: a missing one is named before any work.
    try:
        import matplotlib as mpl  # noqa: F401
        import transformers  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        raise InputError(f"a package is missing ({error}): run `pip install ./eval` in a clone") from error
    from .commands import advise, demo, run

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)
    given = {name: value for name, value in vars(options).items() if value is not None and name != "command"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    command: Any = {"demo": demo, "run": run, "advise": advise}[options.command]
    command.run(command.Options(**given), console)
