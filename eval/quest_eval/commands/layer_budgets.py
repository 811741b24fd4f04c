"""``quest-eval advise --keep``: a budget for each layer, written as a configuration of quest_ops."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quest_ops import QuestConfig
from rich import box
from rich.table import Table

from .. import budget_search, models
from ..budget_search import Choice
from ..errors import InputError
from ..policies.configured import Configured
from ..policies.quest import Quest
from . import advise
from .checks import make_folder, make_policies
from .measurements import Measured, Measurements

if TYPE_CHECKING:
    from rich.console import Console

#: The most perplexity above dense attention's where none is given.
KEEP = 0.01


def run(options: advise.Options, console: Console) -> dict[str, Any]:
    """Measure, search, print a table and write the configuration; returns what was found.

    The configuration goes to ``out`` where that is a JSON file. Otherwise ``out`` is a folder, for ``config.json`` and
    for ``advice.json``, which has the masses and all trials.

    Raises:
        InputError: before any long work, for an argument that cannot be used.
    """
    keep = KEEP if options.keep is None else options.keep
    if not keep > 0:
        raise InputError(f"--keep must be above 0, a share of dense attention's perplexity, got {keep}")
    if options.evaluations < 1:
        raise InputError(f"--evaluations must be at least 1, got {options.evaluations}")
    models.check_device(options.device)
    budgets = sorted({budget for budget in options.budgets if budget < options.length})
    if not budgets:
        raise InputError(f"--budgets must have one below --length, {options.length}")
    policies = [x for x in make_policies((options.policy,), budgets, options.page_size, 0) if isinstance(x, Quest)]
    if not policies or policies[0].shared:
        raise InputError(f"--policy {options.policy} has no QuestConfig to write: name quest-default")
    files, text, sample, store = advise.prepare(options)
    is_file = options.out.suffix == ".json"
    make_folder(options.out.parent if is_file else options.out)
    path = options.out if is_file else options.out / "config.json"

    measurements = Measurements(files, sample, options.length, options.device, store, policies, console)
    rows = []
    for policy in policies:
        with console.status(f"decoding {sample.tail} tokens with a budget of {policy.budget} in every layer"):
            rows.append(measurements.of(policy))
    full, num_layers = measurements.decoder.full_layers, measurements.decoder.num_layers
    layers = [_choices(layer, budgets, rows) if layer in full else [Choice(0, 1.0, 0.0)] for layer in range(num_layers)]
    found: dict[tuple[int, ...], Measured] = {}
    for budget, row in zip(budgets, rows, strict=True):
        uniform = tuple(budget if any(x.budget == budget for x in choices) else 0 for choices in layers)
        if max(uniform):
            found[uniform] = row
    limit = 1 + keep

    def loss(candidate: tuple[int, ...]) -> float:
        number = len(found) - len(rows) + 1
        with console.status(f"trying budget lists: {number} of at most {options.evaluations}"):
            config = _config(policies[0], candidate)
            found[candidate] = measurements.of(Configured("quest-config", None, config=config), mass=False)
        return found[candidate].ratio

    known = {candidate: measured.ratio for candidate, measured in found.items()}
    best, trials = budget_search.search(layers, loss, limit, options.evaluations, known)
    _config(policies[0], best).save(path, model=options.model, num_layers=num_layers)

    dense_bytes = sum(choices[-1].bytes for choices in layers)
    shares = {trial.budgets: trial.bytes / dense_bytes for trial in trials}
    single = min(
        ((shares[budgets], max(budgets)) for budgets in known if known[budgets] <= limit), default=(None, None)
    )
    measured = found.get(best)
    advice: dict[str, Any] = {
        "model": options.model,
        "text": text.name,
        "length": options.length,
        "tokens": sample.tail,
        "policy": options.policy,
        "page_size": policies[0].page_size,
        "keep": keep,
        "dense_perplexity": measurements.dense_perplexity,
        "layer_budgets": list(best),
        "kv_bytes_over_dense": shares.get(best, 1.0),
        "perplexity_over_dense": 1.0 if measured is None else measured.ratio,
        "perplexity_over_dense_error": 0.0 if measured is None else measured.error,
        "best_single_budget": single[1],
        "best_single_kv_bytes_over_dense": single[0],
        "choices": [[asdict(choice) for choice in choices] for choices in layers],
        "trials": [asdict(trial) for trial in trials],
    }
    if not is_file:
        (options.out / "advice.json").write_text(json.dumps(advice, indent=1) + "\n")
    console.print(_table(budgets, layers, best))
    console.print(_words(advice, len(trials) - len(known), str(path)), highlight=False)
    return advice


def _choices(layer: int, budgets: list[int], rows: list[Measured]) -> list[Choice]:
    """A layer's budgets that read less than dense attention, and dense attention."""
    dense = rows[0].usage.kv_bytes_dense
    choices = []
    for budget, row in zip(budgets, rows, strict=True):
        assert row.mass is not None
        if row.usage.kv_bytes_read < dense:
            choices.append(Choice(budget, float(row.mass[layer].mean()), row.usage.kv_bytes_read))
    return [*choices, Choice(0, 1.0, dense)]


def _config(policy: Quest, budgets: tuple[int, ...]) -> QuestConfig:
    return QuestConfig(
        budgets,
        policy.page_size,
        policy.sink_pages,
        policy.recent_pages,
        group_reduce=policy.group_reduce,
        bounds=policy.bounds,
        std_factor=policy.std_factor,
        dense_below=policy.dense_below,
        candidates=policy.candidates,
        reselect_every=policy.reselect_every,
    )


def _table(budgets: list[int], layers: list[list[Choice]], best: tuple[int, ...]) -> Table:
    """A row a layer: its budget, its bytes over those of dense attention, and the mass that each budget keeps."""
    table = Table(title="attention mass by budget, and the choice", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "choice", "bytes", *(f"{budget:,}" for budget in budgets)):
        table.add_column(name, justify="right", no_wrap=True)
    for layer, (choices, budget) in enumerate(zip(layers, best, strict=True)):
        by_budget = {choice.budget: choice for choice in choices}
        share = by_budget[budget].bytes / choices[-1].bytes if choices[-1].bytes else 1
        masses = [by_budget.get(each) for each in budgets]
        cells = ["-" if x is None else f"{x.mass:.3f}" if x.budget != budget else f"[bold]{x.mass:.3f}" for x in masses]
        table.add_row(str(layer), f"{budget:,}" if budget else "dense", f"{share:.0%}", *cells)
    return table


def _words(advice: dict[str, Any], evaluations: int, path: str) -> str:
    keep, error = advice["keep"], advice["perplexity_over_dense_error"]
    if not any(advice["layer_budgets"]):
        return (
            f"No budget list was found with perplexity at most {keep:.1%} above dense attention's: {path} is dense. "
            "Try larger --budgets, a longer --length or another --keep."
        )
    more = advice["perplexity_over_dense"] - 1
    words = [
        f"{path} reads {advice['kv_bytes_over_dense']:.1%} of dense attention's bytes.",
        f"Its perplexity is {abs(more):.2%} {'above' if more >= 0 else 'below'} dense attention's "
        f"(standard error {error:.2%}), at most {keep:.1%} above by --keep.",
    ]
    if advice["best_single_budget"] is None:
        words.append("No single budget of these would do.")
    else:
        share = advice["best_single_kv_bytes_over_dense"]
        budget = advice["best_single_budget"]
        words.append(f"The best single budget, {budget:,} tokens in every layer, reads {share:.1%}.")
    words.append(f"{evaluations} lists were tried. QuestConfig.load({path!r}) gives the configuration.")
    if error > keep:
        words.append("That error is larger than the margin: decode more --tokens for a sure answer.")
    return " ".join(words)
