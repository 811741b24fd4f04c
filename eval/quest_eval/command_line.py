"""The arguments of ``python -m quest_ops eval`` and ``advise``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import PAGE_SIZES

if TYPE_CHECKING:
    from rich.console import Console

_TASKS = [
    *("passkey", "needles", "variable-tracking", "common-words", "perplexity", "pg19"),
    *("qasper", "narrativeqa", "hotpotqa", "multifieldqa_en", "gov_report", "triviaqa"),
]


def add_commands(commands: Any) -> None:
    evaluation = commands.add_parser(
        "eval", help="what policies keep of a model's accuracy, by task, length and budget"
    )
    evaluation.add_argument("tasks", nargs="+", choices=_TASKS, metavar="TASK", help=", ".join(_TASKS))
    evaluation.add_argument("--policies", nargs="+", metavar="NAME", help="dense, quest, h2o, ... (docs/evaluation.md)")
    evaluation.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens, answer included (2048)")
    evaluation.add_argument("--tries", type=int, metavar="N", help="samples a cell (20)")
    evaluation.add_argument("--data", type=Path, metavar="DIR", help="files of LongBench or PG19 (the hub)")
    evaluation.add_argument("--depths", type=float, nargs="+", metavar="D", help="of the fact, 0 to 1 (10 of them)")
    evaluation.add_argument("--needles", type=int, metavar="N", help="facts in a text of the task needles (8)")
    evaluation.add_argument("--scored", type=int, metavar="N", help="tokens that perplexity and pg19 decode (256)")
    evaluation.add_argument("--batch", type=int, metavar="N", help="contexts at a time (what fits)")
    evaluation.add_argument("--chat", action="store_true", default=None, help="use the model's chat template")
    advise = commands.add_parser("advise", help="the attention mass that each budget keeps on your text, by layer")
    advise.add_argument("--target", type=float, metavar="X", help="mass to keep in every layer (0.99)")
    advise.add_argument("--policy", metavar="NAME", help="what to advise on (quest-int8, the default of QuestConfig)")
    advise.add_argument("--length", type=int, metavar="N", help="tokens of the text (4096)")
    advise.add_argument("--tokens", type=int, metavar="N", help="decoded tokens that are measured (64)")
    for command in (evaluation, advise):
        command.add_argument("--model", metavar="NAME", help="a folder or a name on the hub (the bundled model)")
        command.add_argument("--budgets", type=int, nargs="+", metavar="N", help="tokens a head attends to")
        command.add_argument("--text", type=Path, metavar="FILE", help="a long text (the standard library)")
        command.add_argument("--device", choices=("cpu", "cuda"), help="where to run (cpu)")
        command.add_argument(
            "--out", type=Path, metavar="DIR", help=f"for results (results/{command.prog.split()[-1]})"
        )
        command.add_argument("--page-size", type=int, choices=PAGE_SIZES, help="tokens a page (16)")
        command.add_argument("--dense-layers", type=int, metavar="N", help="first layers that read everything (2)")
        command.add_argument("--seed", type=int, metavar="N", help="of names, keys, places and windows (0)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Run the command.

    Raises:
        InputError: something is missing or cannot be.
        ImportError: a package is missing.
    """
    from . import advise, evaluate

    given = {name: value for name, value in vars(options).items() if value is not None and name != "command"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if options.command == "eval":
        evaluate.run(evaluate.Options(**given), console)
    else:
        advise.run(advise.Options(**given), console)
