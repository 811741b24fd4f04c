"""``python -m quest_ops eval``: looks at everything that can be wrong, runs the cells, writes tables and pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _library
from . import models, plots, policies, results, runner, tasks
from .errors import InputError
from .journal import Journal
from .plots import maps
from .session import Session
from .tables import markdown, tables
from .tasks.text import read_text
from .watch import PagesOverTime, Recall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

#: What a device is best at.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
DEFAULT_POLICIES = ("dense", "quest", "quest-head", "h2o", "tova", "streaming", "page-oracle")


@dataclass(frozen=True)
class Options:
    tasks: tuple[str, ...]
    model: str = models.BUNDLED
    policies: tuple[str, ...] = DEFAULT_POLICIES
    budgets: tuple[int, ...] = (64, 256, 1024)
    lengths: tuple[int, ...] = (2048,)
    tries: int = 20
    device: str = "cpu"
    out: Path = Path("results/eval")
    text: Path | None = None
    data: Path | None = None
    depths: tuple[float, ...] | None = None
    needles: int = 8
    scored: int = 256
    chat: bool = False
    page_size: int = 16
    dense_layers: int = 2
    batch: int | None = None
    seed: int = 0


def run(options: Options, console: Console) -> list[results.Cell]:
    """Run an evaluation; returns its cells, which are also in ``options.out``.

    Raises:
        InputError: before any long work, for what cannot be run.
        ImportError: a package of ``quest_ops[eval]`` is missing.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    models.check_device(options.device)
    ways = make_policies(options.policies, options.budgets, options.page_size, options.dense_layers)
    files = models.find(options.model)
    check_lengths(options.lengths, files)
    setup, digest = make_setup(options, files)
    made = [tasks.make(name, setup) for name in dict.fromkeys(options.tasks)]
    cells = [(task, length, task.samples(length)) for task in made for length in dict.fromkeys(options.lengths)]
    settings = _settings(options, digest)
    journal = Journal(options.out / "journal.jsonl", settings)
    model = models.load(files, options.device, DTYPES[options.device])
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(ways) * sum(len(samples) for _, _, samples in cells))

        def tell(samples: int, what: str) -> None:
            progress.update(bar, advance=samples, description=what)

        runner.run(model, files.tokenizer, cells, ways, journal, options.batch, tell)
    found = results.cells(journal.records)
    results.write(options.out, settings, found)
    (options.out / "results.md").write_text(markdown(found))
    for table in tables(found):
        console.print(table)
    pictures = plots.draw(found, options.out)
    watched = [way for way in ways if way.name.startswith("quest")]
    if watched:
        # The first of Quest's, at its middle budget.
        watched = [way for way in watched if way.name == watched[0].name]
        pictures += _watch(model, files.tokenizer, cells[-1], watched[len(watched) // 2], options.out)
    console.print(
        f"Written to {options.out}: results.json, results.csv, results.md, {', '.join(pictures)}", highlight=False
    )
    return found


def _watch(
    model: Any, tokenizer: models.Tokenizer, cell: tuple[tasks.Task, int, list[tasks.Sample]],
    policy: policies.Policy, folder: Path,
) -> list[str]:  # fmt: skip
    """Pictures of what a policy reads for the first sample: attention mass by layer and head, and pages over time."""
    task, length, samples = cell
    ids = torch.tensor([samples[0].ids])
    context, tail = ids[:, : -samples[0].tail], ids[:, -samples[0].tail :]
    session = Session(model, max_tokens=length + 1, page_size=policy.page_size)
    session.read(context, policies=[policy])
    title = f"{policy.label()}, budget {policy.budget}: {task.name}, {length:,} tokens"
    recall, pages = Recall(), PagesOverTime()
    for observer in (recall, pages):
        session.observer = observer
        if task.answer_tokens:
            session.generate(policy, tail, task.answer_tokens, tokenizer.eos)
        else:
            session.score(policy, tail)
    kept = recall.by_head()
    heads = [f"{head}" for head in range(kept.shape[1])]
    maps.grid(kept, "layer", "query head", heads, f"Attention mass kept. {title}", folder / "recall.png")
    found = pages.by_layer(-(-length // policy.page_size))
    if not found:
        return ["recall.png"]
    maps.pages_over_time(found, policy.page_size, f"Pages read. {title}", folder / "pages.png")
    return ["recall.png", "pages.png"]


def make_policies(
    names: Sequence[str], budgets: Sequence[int], page_size: int, dense_layers: int
) -> list[policies.Policy]:
    """Each policy at each budget, those without one once."""
    for budget in budgets:
        if budget < 2 * page_size or budget % page_size:
            raise InputError(
                f"--budgets must be multiples of the page size, {page_size}, from {2 * page_size} on, got {budget}"
            )
    try:
        made = [
            policies.make(name, budget, page_size=page_size, dense_layers=dense_layers)
            for name in names
            for budget in budgets
        ]
    except ValueError as error:
        raise InputError(f"--policies and --budgets: {error}") from error
    if not made:
        raise InputError("--policies and --budgets must name at least one each")
    return list(dict.fromkeys(made))


def check_lengths(lengths: Sequence[int], files: models.ModelFiles) -> None:
    if files.max_tokens is not None and max(lengths) > files.max_tokens:
        raise InputError(f"--lengths must be at most {files.max_tokens}, which the model knows, got {max(lengths)}")


def make_setup(options: Options, files: models.ModelFiles) -> tuple[tasks.Setup, str]:
    """What tasks are made from, and a digest of the text."""
    for name in ("tries", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if options.depths is not None and not all(0 <= depth <= 1 for depth in options.depths):
        raise InputError(f"--depths must be from 0 to 1, got {' '.join(map(str, options.depths))}")
    text = read_text(options.text, files.tokenizer) if set(options.tasks) & set(tasks.NEEDS_TEXT) else None
    setup = tasks.Setup(
        files.tokenizer, text, options.tries, options.seed, options.chat,
        needles=options.needles, scored=options.scored, data=options.data,
    )  # fmt: skip
    files.tokenizer.frame(options.chat)
    if options.depths:
        setup = replace(setup, depths=options.depths)
    return setup, hashlib.sha256(text.text.encode()).hexdigest()[:16] if text else ""


def _settings(options: Options, digest: str) -> dict[str, Any]:
    """What decides the results: a journal with other settings is another run's."""
    names = ("model", "tries", "device", "needles", "scored", "chat", "page_size", "dense_layers", "seed")
    return {name: getattr(options, name) for name in names} | {
        "depths": options.depths and list(options.depths),
        "text": "the Python standard library" if options.text is None else options.text.name,
        "text_sha256": digest,
        "dtype": str(DTYPES[options.device]).removeprefix("torch."),
        "torch": torch.__version__,
        "quest_ops": _library.build_info["version"],
    }
