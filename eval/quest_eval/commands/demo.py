"""``python -m quest_ops demo``: a language model finds facts in a long text, reading a small part of its cache."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _library
from . import demo_policies as policies
from . import needles, retrieval_model
from .runs import Answer, Reader

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Tokens of the text where none are asked for.
DEFAULT_TOKENS = {"cpu": 16384, "cuda": 32768}
#: The type each device decodes fastest in.
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Tokens prefilled at a time: small enough on a CPU for the bar to move.
_CHUNKS = {"cpu": 2048, "cuda": 32768}


class DemoError(ValueError):
    """Something is missing or cannot be; the message says what to do."""


@dataclass(frozen=True)
class Options:
    text: Path | None = None
    tokens: int | None = None
    facts: int = 8
    device: str = "cpu"
    budgets: tuple[int, ...] = (64, 256, 1024)
    page_size: int = 16
    seed: int = 0
    out: Path = Path("results/demo")


@dataclass(frozen=True)
class Row:
    """What one policy gave."""

    policy: policies.Policy
    answers: list[Answer]
    ms_per_token: float
    #: What a step reads of all keys and values, bounds included: the mean over the layers, and in the last layer.
    share: float
    last_layer_share: float
    kv_bytes_per_token: float

    @property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the demo, print its table, write ``pages.png`` and ``results.json``; returns what is in the latter.

    Raises:
        DemoError: before any long work, for a text, device or number with which it cannot run.
        ImportError: a package of ``quest_ops[demo]`` is missing.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # Everything that can be wrong is looked at first.
    from .pictures import draw_reading

    ways = _policies(options)
    _check_device(options.device)
    haystack = _haystack(options)
    _make_folder(options.out)
    length, facts = len(haystack.text), haystack.facts
    dtype = _DTYPES[options.device]
    console.print(
        f"{length:,} tokens (one a byte) of {options.text or 'the Python standard library'}, {len(facts)} facts hidden "
        f"in them; {options.device}, {str(dtype).removeprefix('torch.')}, pages of {options.page_size}",
        highlight=False,
        soft_wrap=True,
    )
    model = retrieval_model.load(options.device, dtype)
    reader = Reader(model, length, options.page_size)
    ways = [policies.dense(reader.num_layers, options.page_size), *ways]
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("reading the text", total=length)
        reader.read(haystack.text, _CHUNKS[options.device], lambda tokens: progress.advance(bar, tokens))
        bar = progress.add_task("asking", total=len(ways) * len(facts))
        for policy in ways:
            answers = []
            for fact in facts:
                answers.append(reader.ask(fact, policy))
                progress.advance(bar)
            rows.append(_row(reader, policy, answers))
    console.print(_table(rows, facts, length, console))
    console.print(
        f"Question and answer are decoded token by token from one densely read text; ms is the median. Quest and the "
        f"window of recent tokens read everything in the first {policies.DENSE_LAYERS} of {reader.num_layers} layers. "
        f"MB are keys, values and bounds read for a token, a mean over the layers, with their share of dense; below it "
        f"the same in the sparse layers alone.",
        highlight=False,
    )

    shown = _shown(rows, facts)
    picture = options.out / "pages.png"
    draw_reading(reader.watch(*shown), facts, length, picture)
    results = _results(options, rows, facts, length)
    numbers = options.out / "results.json"
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    files = f"Picture of the pages read: {picture}\nThe table as JSON: {numbers}"
    console.print(files, highlight=False, soft_wrap=True)
    return results


def _policies(options: Options) -> list[policies.Policy]:
    if not options.budgets:
        raise DemoError("--budgets must name at least one number of tokens")
    least = 2 * options.page_size
    for budget in options.budgets:
        if budget < least or budget % options.page_size:
            raise DemoError(
                f"--budgets must be multiples of the page size, {options.page_size}, from {least} on, got {budget}"
            )
    try:
        return [
            make(budget, options.page_size)
            for make in (policies.quest, policies.recent_window)
            for budget in options.budgets
        ]
    except ValueError as error:
        raise DemoError(str(error)) from error


def _check_device(device: str) -> None:
    if device != "cuda":
        return
    if _library.cuda_missing:
        raise DemoError(f"--device cuda is not possible: {_library.cuda_missing}")
    if not torch.cuda.is_available():
        raise DemoError("--device cuda is not possible: torch finds no CUDA device on this machine")


def _haystack(options: Options) -> needles.Haystack:
    wanted = DEFAULT_TOKENS[options.device] if options.tokens is None else options.tokens
    if wanted > retrieval_model.MAX_TOKENS:
        raise DemoError(f"--tokens must be at most {retrieval_model.MAX_TOKENS}, which the model knows, got {wanted}")
    if options.text is None:
        text = needles.standard_library_text(wanted)
    else:
        try:
            with options.text.open("rb") as file:
                text = file.read(wanted)
        except OSError as error:
            raise DemoError(f"--text {options.text} cannot be read: {error.strerror}") from error
    if options.tokens is None:
        wanted = min(wanted, len(text))
    try:
        return needles.hide_facts(text, wanted, options.facts, options.seed)
    except ValueError as error:
        raise DemoError(str(error)) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {folder} cannot be made: {error.strerror}") from error


def _row(reader: Reader, policy: policies.Policy, answers: list[Answer]) -> Row:
    seconds = [second for answer in answers for second in answer.seconds]
    what = (reader.head_dim, reader.model.dtype)
    shares = [policy.share_read(reader.text_tokens, layer, *what) for layer in range(reader.num_layers)]
    return Row(
        policy=policy,
        answers=answers,
        ms_per_token=1e3 * statistics.median(seconds),
        share=statistics.mean(shares),
        last_layer_share=shares[-1],
        kv_bytes_per_token=statistics.mean(shares) * reader.kv_bytes,
    )


def _table(rows: list[Row], facts: list[needles.Fact], length: int, console: Console) -> Table:
    from rich import box
    from rich.table import Table

    yes, no = ("✓", "✗") if console.encoding.lower().startswith("utf") else ("+", "-")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("fact, depth")
    table.add_column("key", justify="right")
    for row in rows:
        name = row.policy.name if row.policy.budget is None else f"{row.policy.name}\n{row.policy.budget}"
        table.add_column(name, justify="right", no_wrap=True)
    for i, fact in enumerate(facts):
        cells = []
        for row in rows:
            answer = row.answers[i]
            cells.append(f"{answer.text}{yes}" if answer.right else f"[red]{answer.text}{no}[/red]")
        table.add_row(f"{fact.name} {fact.start / length:.0%}", fact.key, *cells)
    table.add_section()
    table.add_row("exact match", "", *(f"[bold]{row.right}/{len(facts)}[/bold]" for row in rows))
    table.add_row("ms a token", "", *(f"{row.ms_per_token:.1f}" for row in rows))
    table.add_row("MB a layer", "", *(f"{row.kv_bytes_per_token / 1e6:.2f}" for row in rows))
    table.add_row("of dense", "", *(f"{row.share:.1%}" for row in rows))
    table.add_row(" sparse layers", "", *(f"{row.last_layer_share:.1%}" for row in rows))
    return table


def _shown(rows: list[Row], facts: list[needles.Fact]) -> tuple[needles.Fact, policies.Policy]:
    """What to draw: the middle budget of Quest, and the fact nearest the middle of the text that it found."""
    quest = [row for row in rows if row.policy.name == "Quest"]
    row = quest[len(quest) // 2]
    found = [i for i, answer in enumerate(row.answers) if answer.right] or list(range(len(facts)))
    return facts[min(found, key=lambda i: abs(i - len(facts) // 2))], row.policy


def _results(options: Options, rows: list[Row], facts: list[needles.Fact], length: int) -> dict[str, Any]:
    return {
        "text": "standard library" if options.text is None else options.text.name,
        "tokens": length,
        "page_size": options.page_size,
        "seed": options.seed,
        "device": options.device,
        "device_name": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "dtype": str(_DTYPES[options.device]).removeprefix("torch."),
        "torch": torch.__version__,
        "quest_ops": _library.build_info["version"],
        "facts": [asdict(fact) for fact in facts],
        "policies": [
            {
                "name": row.policy.name,
                "budget": row.policy.budget,
                "answers": [answer.text for answer in row.answers],
                "right": [answer.right for answer in row.answers],
                "exact_match": row.right / len(facts),
                "ms_per_token": row.ms_per_token,
                "kv_bytes_per_token": row.kv_bytes_per_token,
                "share_of_dense": row.share,
                "share_of_dense_in_sparse_layers": row.last_layer_share,
            }
            for row in rows
        ],
    }
