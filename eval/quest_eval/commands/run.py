"""``quest-eval run``: policies on tasks at lengths and budgets; writes tables and plots."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quest_ops
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import models, plots, tasks
from ..command_line import DEFAULT_POLICIES
from ..decoding.observers import PagesRead, Recall
from ..decoding.policy_decoder import PolicyDecoder
from ..errors import InputError
from ..grid import run_grid
from ..plots import maps
from ..plots.pages import pages_over_time
from ..plots.style import is_reference
from ..policies import PagePolicy
from ..results import cells as results
from ..results.journal import Journal
from ..results.tables import markdown, tables
from ..tasks import genres
from ..tasks.text import read_text
from .checks import check_lengths, make_policies, make_store

if TYPE_CHECKING:
    from rich.console import Console

    from ..decoding.prefill_store import PrefillStore
    from ..policies import Policy


@dataclass(frozen=True)
class Options:
    tasks: tuple[str, ...]
    model: str = models.BUNDLED
    policies: tuple[str, ...] = DEFAULT_POLICIES
    #: Policies beside those, of one's own.
    policy: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (64, 256, 1024)
    lengths: tuple[int, ...] = (2048,)
    tries: int = 20
    device: str = "cpu"
    out: Path = Path("results/run")
    text: Path | None = None
    data: Path | None = None
    depths: tuple[float, ...] | None = None
    needles: int = 8
    scored: int = 256
    chat: bool = False
    page_size: int = 16
    dense_layers: int = 2
    genres: tuple[str, ...] = genres.NAMES
    batch: int | None = None
    prefills: float | None = None
    seed: int = 0


def run(options: Options, console: Console) -> list[results.Cell]:
    """Run an evaluation; returns its cells, which are also in ``options.out``.

    Raises:
        InputError: before any long work, for an argument that cannot be used.
    """
    models.check_device(options.device)
    names = (*options.policies, *options.policy)
    policies = make_policies(names, options.budgets, options.page_size, options.dense_layers)
    if "loss" in options.tasks and "dense" not in options.policies:
        raise InputError("task loss compares with dense attention: add dense to --policies")
    store = make_store(options.prefills, options.device)
    files = models.find(options.model)
    check_lengths(options.lengths, files)
    setup, digest = make_setup(options, files)
    made = [tasks.make(name, setup) for name in dict.fromkeys(options.tasks)]
    cells = [(task, length, task.samples(length)) for task in made for length in dict.fromkeys(options.lengths)]
    settings = _settings(options, digest)
    journal = Journal(options.out / "journal.jsonl", settings)
    model = models.load(files, options.device, models.DTYPES[options.device])
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(policies) * sum(len(samples) for _, _, samples in cells))

        def tell(samples: int, next_work: str) -> None:
            progress.update(bar, advance=samples, description=next_work)

        run_grid(model, files.tokenizer, cells, policies, journal, options.batch, store, tell)
    found = results.cells(journal.records)
    results.write(options.out, settings, found)
    (options.out / "results.md").write_text(markdown(found))
    for table in tables(found):
        console.print(table)
    pictures = plots.draw(found, options.out)
    watched = [policy for policy in policies if isinstance(policy, PagePolicy) and not is_reference(policy.name)]
    if watched:
        # The first policy that selects pages, at its middle budget.
        watched = [policy for policy in watched if policy.name == watched[0].name]
        pictures += _watch(model, files.tokenizer, cells[-1], watched[len(watched) // 2], options.out, store)
    console.print(
        f"Written to {options.out}: results.json, results.csv, results.md, {', '.join(pictures)}", highlight=False
    )
    return found


def _watch(
    model: Any, tokenizer: models.Tokenizer, cell: tuple[tasks.Task, int, list[tasks.Sample]],
    policy: Policy, folder: Path, store: PrefillStore | None,
) -> list[str]:  # fmt: skip
    """Plots of a policy's selection for the first sample: attention mass by layer and head, and pages over time."""
    task, length, samples = cell
    ids = torch.tensor([samples[0].ids])
    context, tail = ids[:, : -samples[0].tail], ids[:, -samples[0].tail :]
    decoder = PolicyDecoder(
        model,
        max_tokens=length + 1,
        page_size=policy.page_size,
        store=store,
        fingerprint="" if store is None else models.fingerprint(model),
    )
    decoder.prefill(context, policies=[policy])
    title = f"{policy.label()}, budget {policy.budget}: {task.name}, {length:,} tokens"
    recall, pages = Recall(), PagesRead()
    for observer in (recall, pages):
        decoder.observer = observer
        if task.answer_tokens:
            decoder.generate(policy, tail, task.answer_tokens, tokenizer.eos)
        else:
            decoder.score(policy, tail)
    kept = recall.by_head()
    heads = [f"{head}" for head in range(kept.shape[1])]
    maps.grid(kept, "layer", "query head", heads, f"Attention mass kept. {title}", folder / "recall.png")
    found = pages.over_time(-(-length // policy.page_size))
    if not found:
        return ["recall.png"]
    pages_over_time(found, policy.page_size, f"Pages read. {title}", folder / "pages.png")
    return ["recall.png", "pages.png"]


def make_setup(options: Options, files: models.ModelFiles) -> tuple[tasks.Setup, str]:
    """The material of the tasks, and a digest of the text."""
    for name in ("tries", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if options.depths is not None and not all(0 <= depth <= 1 for depth in options.depths):
        raise InputError(f"--depths must be from 0 to 1, got {' '.join(map(str, options.depths))}")
    text = read_text(options.text, files.tokenizer) if set(options.tasks) & set(tasks.NEEDS_TEXT) else None
    setup = tasks.Setup(
        files.tokenizer, text, options.tries, options.seed, options.chat,
        needles=options.needles, scored=options.scored, genres=options.genres, data=options.data,
    )  # fmt: skip
    files.tokenizer.frame(options.chat)
    if options.depths:
        setup = replace(setup, depths=options.depths)
    return setup, _digest(text.text) if text else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings(options: Options, digest: str) -> dict[str, Any]:
    """The settings that decide the results: a journal with others belongs to another run."""
    names = ("model", "tries", "device", "needles", "scored", "chat", "page_size", "dense_layers", "seed")
    of_loss = {name: _digest(genres.read(name)) for name in options.genres} if "loss" in options.tasks else {}
    return (
        {name: getattr(options, name) for name in names}
        | ({"genres": of_loss} if of_loss else {})
        | {
            "depths": options.depths and list(options.depths),
            "text": "the Python standard library" if options.text is None else options.text.name,
            "text_sha256": digest,
            "dtype": str(models.DTYPES[options.device]).removeprefix("torch."),
            "torch": torch.__version__,
            "quest_ops": quest_ops.__version__,
        }
    )
