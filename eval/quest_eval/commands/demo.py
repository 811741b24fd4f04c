"""``quest-eval demo``: the bundled model finds facts in a long text, reading a small part of its cache."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quest_ops
import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import bundled_model
from ..decoding.kv_usage import kv_usage
from ..decoding.observers import PagesRead
from ..decoding.policy_decoder import PolicyDecoder
from ..errors import InputError
from ..models import DTYPES, check_device
from ..plots.pages import AnswerPages, pages_of_answer
from ..tasks.facts import KEY_DIGITS, Fact, Haystack, hide_facts
from ..tasks.text import read_bytes
from .checks import make_folder, make_policies

if TYPE_CHECKING:
    from rich.console import Console

    from ..policies import Policy

#: Tokens of the text where none are asked for.
DEFAULT_TOKENS = {"cpu": 16384, "cuda": 32768}
#: Columns of the table, by policy.
COLUMNS = {"dense": "dense", "quest-default": "Quest", "window": "window"}
#: Layers that are dense under every policy, as in the paper.
DENSE_LAYERS = 2
# Tokens prefilled at a time: small enough on a CPU for the bar to move.
_CHUNKS = {"cpu": 2048, "cuda": 32768}
# Room behind the text for a question and its answer.
_QUESTION_TOKENS = 128


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
class Answer:
    text: str
    right: bool
    #: One entry a decoding step, those of the question included.
    seconds: list[float]


@dataclass(frozen=True)
class Column:
    """The answers under one policy, with the time and the bytes of a step."""

    policy: Policy
    answers: list[Answer]
    ms_per_token: float
    #: The share of all keys and values that a step reads, bounds included: a mean over the layers, and in a sparse one.
    share: float
    sparse_layer_share: float
    kv_bytes_per_token: float

    @property
    def name(self) -> str:
        return COLUMNS[self.policy.name]

    @property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the demo, print its table, write ``pages.png`` and ``results.json``; returns the content of the latter.

    Raises:
        InputError: before any long work, for a text, device or number with which it cannot run.
    """
    policies = make_policies(tuple(COLUMNS), options.budgets, options.page_size, DENSE_LAYERS)
    check_device(options.device)
    haystack = hide(options)
    make_folder(options.out)
    length, facts = len(haystack.text), haystack.facts
    dtype = DTYPES[options.device]
    hidden = "1 fact" if len(facts) == 1 else f"{len(facts)} facts"
    console.print(
        f"{length:,} tokens (one a byte) of {options.text or 'the Python standard library'}, {hidden} hidden in them; "
        f"{options.device}, {str(dtype).removeprefix('torch.')}, pages of {options.page_size}",
        highlight=False,
        soft_wrap=True,
    )
    model = bundled_model.load(options.device, dtype)
    decoder = PolicyDecoder(model, max_tokens=length + _QUESTION_TOKENS, page_size=options.page_size)
    bars = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = []
    with Progress(*bars, console=console) as progress:
        bar = progress.add_task("reading the text", total=length)
        ids = torch.tensor([list(haystack.text)])
        chunk = _CHUNKS[options.device]
        decoder.prefill(ids, policies=policies, chunk=chunk, progress=lambda n: progress.advance(bar, n))
        bar = progress.add_task("asking", total=len(policies) * len(facts))
        for policy in policies:
            answers = []
            for fact in facts:
                answers.append(ask(decoder, policy, fact))
                progress.advance(bar)
            columns.append(_column(decoder, policy, length, answers))
    console.print(_table(columns, facts, length, console))
    if columns[0].right < len(facts):
        console.print(
            f"Dense attention itself finds {columns[0].right} of {len(facts)}: the bundled model does not know such a "
            f"text. Judge the other columns by the facts that dense attention finds.",
            highlight=False,
        )
    console.print(
        f"Question and answer are decoded token by token from one densely read text; ms is the median. Quest and the "
        f"window of recent tokens read everything in the first {DENSE_LAYERS} of {decoder.num_layers} layers. "
        f"MB are keys, values and bounds read for a token, a mean over the layers, with their share of dense; below it "
        f"the same in the sparse layers alone.",
        highlight=False,
    )
    picture, numbers = options.out / "pages.png", options.out / "results.json"
    _draw(decoder, *_shown(columns, facts), facts, length, picture)
    results = _results(options, columns, facts, length)
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    files = f"Picture of the pages read: {picture}\nThe table as JSON: {numbers}"
    console.print(files, highlight=False, soft_wrap=True)
    return results


def hide(options: Options) -> Haystack:
    """The text with its facts.

    Raises:
        InputError: a text or number of tokens or facts with which that cannot be.
    """
    wanted = DEFAULT_TOKENS[options.device] if options.tokens is None else options.tokens
    if wanted > bundled_model.MAX_TOKENS:
        raise InputError(f"--tokens must be at most {bundled_model.MAX_TOKENS}, which the model knows, got {wanted}")
    text, _ = read_bytes(options.text, wanted)
    if options.tokens is None:
        wanted = min(wanted, len(text))
    return hide_facts(text, wanted, options.facts, options.seed)


def ask(decoder: PolicyDecoder, policy: Policy, fact: Fact) -> Answer:
    """The model's answer to the fact's question, behind the text that the decoder has read."""
    ends = [time.perf_counter()]

    def note_time() -> None:
        if decoder.model.device.type == "cuda":
            torch.cuda.synchronize()  # else a step would be timed until its launch
        ends.append(time.perf_counter())

    answer = decoder.generate(policy, torch.tensor([list(fact.question)]), KEY_DIGITS, on_step=note_time)[0].tolist()
    text = "".join(chr(byte) if 33 <= byte < 127 else "." for byte in answer)
    return Answer(text, text == fact.key, [end - start for start, end in itertools.pairwise(ends)])


def _column(decoder: PolicyDecoder, policy: Policy, length: int, answers: list[Answer]) -> Column:
    # The step that reads the text's last token.
    usage = kv_usage(policy, decoder.shape, decoder.full_layers, length - 1, length)
    return Column(
        policy=policy,
        answers=answers,
        ms_per_token=1e3 * statistics.median(second for answer in answers for second in answer.seconds),
        share=usage.kv_bytes_read / usage.kv_bytes_dense,
        sparse_layer_share=policy.bytes_read(decoder.shape, length - 1, length) / usage.kv_bytes_dense,
        kv_bytes_per_token=usage.kv_bytes_read,
    )


def _table(columns: list[Column], facts: list[Fact], length: int, console: Console) -> Table:
    yes, no = ("✓", "✗") if console.encoding.lower().startswith("utf") else ("+", "-")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("fact, depth")
    table.add_column("key", justify="right")
    for column in columns:
        budget = "" if column.policy.budget is None else f"\n{column.policy.budget}"
        table.add_column(f"{column.name}{budget}", justify="right", no_wrap=True)
    for i, fact in enumerate(facts):
        answers = [column.answers[i] for column in columns]
        cells = (f"{a.text}{yes}" if a.right else f"[red]{a.text}{no}[/red]" for a in answers)
        table.add_row(f"{fact.name} {fact.start / length:.0%}", fact.key, *cells)
    table.add_section()
    table.add_row("exact match", "", *(f"[bold]{column.right}/{len(facts)}[/bold]" for column in columns))
    table.add_row("ms a token", "", *(f"{column.ms_per_token:.1f}" for column in columns))
    table.add_row("MB a layer", "", *(f"{column.kv_bytes_per_token / 1e6:.2f}" for column in columns))
    table.add_row("of dense", "", *(f"{column.share:.1%}" for column in columns))
    table.add_row(" sparse layers", "", *(f"{column.sparse_layer_share:.1%}" for column in columns))
    return table


def _shown(columns: list[Column], facts: list[Fact]) -> tuple[Policy, Fact]:
    """The answer to draw: of Quest's middle budget, the fact nearest the middle of the text that it found."""
    quest = [column for column in columns if column.name == "Quest"]
    column = quest[len(quest) // 2]
    found = [i for i, answer in enumerate(column.answers) if answer.right] or list(range(len(facts)))
    return column.policy, facts[min(found, key=lambda i: abs(i - len(facts) // 2))]


def _draw(decoder: PolicyDecoder, policy: Policy, fact: Fact, facts: list[Fact], text_tokens: int, path: Path) -> None:
    """Ask once more, and draw the pages that are read for the answer's tokens."""
    answer, pages = watch(decoder, policy, fact, text_tokens)
    title = (
        f'Pages read to answer "The pass key of {fact.name} is" with {answer.text}: '
        f"budget {policy.budget} of {pages.length:,} tokens, pages of {policy.page_size}"
    )
    others = [other.start for other in facts if other.start != fact.start]
    pages_of_answer(pages, (fact.start, fact.stop), others, title, path)


def watch(decoder: PolicyDecoder, policy: Policy, fact: Fact, text_tokens: int) -> tuple[Answer, AnswerPages]:
    """An answer, and the pages that its tokens read."""
    decoder.observer = observer = PagesRead()
    try:
        answer = ask(decoder, policy, fact)
    finally:
        decoder.observer = None
    length = text_tokens + len(fact.question) + KEY_DIGITS - 1
    # The step of the question's last token gives the first digit, and that of the last digit but one the last.
    counts = observer.by_head(-(-length // policy.page_size), decoder.shape.kv_heads, KEY_DIGITS)
    return answer, AnswerPages(counts, decoder.num_layers, policy.page_size, length, KEY_DIGITS, text_tokens)


def _results(options: Options, columns: list[Column], facts: list[Fact], length: int) -> dict[str, Any]:
    return {
        "text": "standard library" if options.text is None else options.text.name,
        "tokens": length,
        "page_size": options.page_size,
        "seed": options.seed,
        "device": options.device,
        "device_name": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "dtype": str(DTYPES[options.device]).removeprefix("torch."),
        "torch": torch.__version__,
        "quest_ops": quest_ops.__version__,
        "facts": [asdict(fact) for fact in facts],
        "policies": [
            {
                "name": column.name,
                "budget": column.policy.budget,
                "answers": [answer.text for answer in column.answers],
                "right": [answer.right for answer in column.answers],
                "exact_match": column.right / len(facts),
                "ms_per_token": column.ms_per_token,
                "kv_bytes_per_token": column.kv_bytes_per_token,
                "share_of_dense": column.share,
                "share_of_dense_in_sparse_layers": column.sparse_layer_share,
            }
            for column in columns
        ],
    }
