"""``quest-eval advise``: the attention mass and perplexity that each budget keeps on a text, and a recommendation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from .. import models, tasks
from ..errors import InputError
from ..plots import maps
from ..tasks.text import read_text
from . import layer_budgets
from .checks import check_lengths, make_folder, make_policies, make_store
from .measurements import Measurements

if TYPE_CHECKING:
    from rich.console import Console

    from ..decoding.prefill_store import PrefillStore
    from ..tasks import Sample
    from ..tasks.text import Text


#: Targets where none is given: the least share of the attention mass, and the most perplexity over dense attention's.
TARGETS = {"mass": 0.99, "perplexity": 1.01}


@dataclass(frozen=True)
class Options:
    model: str = models.BUNDLED
    text: Path | None = None
    #: Decides on a budget: one of TARGETS.
    criterion: str = "mass"
    target: float | None = None
    budgets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    policy: str = "quest-default"
    length: int = 4096
    tokens: int = 64
    device: str = "cpu"
    out: Path = Path("results/advise")
    page_size: int = 16
    dense_layers: int = 2
    prefills: float | None = None
    seed: int = 0
    #: Seek a budget for each layer, with at most this perplexity above dense attention's.
    keep: float | None = None
    evaluations: int = 24


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measure, print a table, write ``advice.json`` and ``advice.png``; returns the content of the former.

    With ``keep``, or a JSON file for ``out``, it seeks a budget for each layer instead:
    :mod:`quest_eval.commands.layer_budgets`.

    Raises:
        InputError: before any long work, for an argument that cannot be used.
    """
    if options.keep is not None or options.out.suffix == ".json":
        return layer_budgets.run(options, console)
    target = TARGETS[options.criterion] if options.target is None else options.target
    if options.criterion == "mass" and not 0 < target <= 1:
        raise InputError(f"--target must be above 0 and at most 1 for mass, got {target}")
    if options.criterion == "perplexity" and not target >= 1:
        raise InputError(f"--target must be at least 1 for perplexity, got {target}")
    models.check_device(options.device)
    budgets = sorted(set(options.budgets))
    policies = make_policies((options.policy,), budgets, options.page_size, options.dense_layers)
    if policies[0].budget is None:
        raise InputError(f"--policy {options.policy} has no budget to advise on: name another")
    files, text, sample, store = prepare(options)
    make_folder(options.out)

    measurements = Measurements(files, sample, options.length, options.device, store, policies, console)
    layers, dense_perplexity = measurements.decoder.num_layers, measurements.dense_perplexity
    if options.dense_layers >= layers:
        raise InputError(f"--dense-layers must be below the model's {layers}, got {options.dense_layers}")
    rows: list[dict[str, Any]] = []
    for policy in policies:
        with console.status(f"decoding {sample.tail} tokens with a budget of {policy.budget}"):
            found = measurements.of(policy)
        kept = found.mass
        assert kept is not None
        rows.append(
            {
                "budget": policy.budget,
                "mass_by_layer": kept.mean(1).tolist(),
                "mass_by_layer_and_head": kept.tolist(),
                "weakest_layer": float(kept.mean(1)[policy.dense_layers :].min()),
                "perplexity": dense_perplexity * found.ratio,
                "perplexity_over_dense": found.ratio,
                "perplexity_over_dense_error": found.error,
            }
        )
    smallest = {criterion: _smallest(rows, criterion, TARGETS[criterion]) for criterion in TARGETS}
    smallest[options.criterion] = _smallest(rows, options.criterion, target)
    budget = smallest[options.criterion]
    advice: dict[str, Any] = {
        "model": options.model,
        "text": text.name,
        "length": options.length,
        "tokens": sample.tail,
        "policy": options.policy,
        "page_size": options.page_size,
        "dense_layers": options.dense_layers,
        "criterion": options.criterion,
        "target": target,
        "recommended_budget": budget,
        "recommends_dense": budget is not None and budget >= options.length,
        "dense_perplexity": dense_perplexity,
        "budgets": rows,
    }
    (options.out / "advice.json").write_text(json.dumps(advice, indent=1) + "\n")
    masses = torch.tensor([row["mass_by_layer"] for row in rows]).T
    title = f"Attention mass kept: {options.policy}, {options.length:,} tokens of {text.name}"
    maps.grid(
        masses, "layer", "budget in tokens", [f"{budget}" for budget in budgets], title, options.out / "advice.png"
    )
    console.print(_table(advice))
    console.print(_advice(advice, smallest), highlight=False)
    return advice


def prepare(options: Options) -> tuple[models.ModelFiles, Text, Sample, PrefillStore | None]:
    """The model's files, the text, its sample and the store of prefills, before any long work."""
    files = models.find(options.model)
    check_lengths((options.length,), files)
    text = read_text(options.text, files.tokenizer)
    setup = tasks.Setup(files.tokenizer, text, tries=1, seed=options.seed, scored=options.tokens)
    sample = tasks.make("perplexity", setup).samples(options.length)[0]
    return files, text, sample, make_store(options.prefills, options.device)


def _smallest(rows: list[dict[str, Any]], criterion: str, target: float) -> int | None:
    """The smallest budget that meets the target as all larger ones do: perplexity may meet it by chance."""
    budget = None
    for row in reversed(rows):
        met = row["weakest_layer"] >= target if criterion == "mass" else row["perplexity_over_dense"] <= target
        if not met:
            break
        budget = row["budget"]
    return budget


def _table(advice: dict[str, Any]) -> Table:
    """Layers by budgets: as wide for a model of many layers as for one of few."""
    rows = advice["budgets"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("budget", *(f"{row['budget']:,}" for row in rows), "dense"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in range(len(rows[0]["mass_by_layer"])):
        table.add_row(f"layer {layer}", *(f"{row['mass_by_layer'][layer]:.3f}" for row in rows), "1")
    table.add_section()
    table.add_row("weakest", *(f"{row['weakest_layer']:.3f}" for row in rows), "1")
    table.add_row("perplexity", *(f"{row['perplexity']:.3f}" for row in rows), f"{advice['dense_perplexity']:.3f}")
    table.add_row("over dense", *(f"{row['perplexity_over_dense'] - 1:+.1%}" for row in rows), "")
    table.add_row("± error", *(f"{row['perplexity_over_dense_error']:.1%}" for row in rows), "")
    return table


def _advice(advice: dict[str, Any], found: dict[str, int | None]) -> str:
    """The answer, the figures behind it, and the answer by the other criterion where that is smaller."""
    rows, length, criterion = advice["budgets"], advice["length"], advice["criterion"]
    other = "perplexity" if criterion == "mass" else "mass"
    kept = {row["budget"]: _kept(row, advice["dense_layers"]) for row in rows}
    aim = {
        "mass": f"keeps {advice['target']:.1%} of the attention's weights in every sparse layer",
        "perplexity": f"has at most {advice['target']:.4g} times dense attention's perplexity",
    }[criterion]
    budget, second, smaller = found[criterion], found[other], [each for each in kept if each < length]
    if budget is None:
        words = [
            f"No budget of these {aim}.",
            f"The largest, {rows[-1]['budget']:,} tokens, {kept[rows[-1]['budget']]}.",
        ]
    elif budget >= length:
        words = [f"Recommended: dense attention. Only a budget that holds all {length:,} tokens {aim}."]
        words += [f"The largest below that, {smaller[-1]:,} tokens, {kept[smaller[-1]]}."] if smaller else []
    else:
        words = [
            f"Recommended budget: {budget:,} of {length:,} tokens, the smallest of these that {aim}.",
            f"It {kept[budget]}.",
        ]
    told = budget if criterion == "perplexity" else None
    if second is not None and second < length and (budget is None or second < budget):
        words.append(f"By --criterion {other} the answer is {second:,} tokens, which {kept[second]}.")
        told = second if other == "perplexity" else told
    elif budget is None:
        words.append("Try larger --budgets or another --target.")
    margin = (advice["target"] if criterion == "perplexity" else TARGETS["perplexity"]) - 1
    if told is not None and any(row["budget"] == told and row["perplexity_over_dense_error"] > margin for row in rows):
        words.append(f"That error is larger than the margin of {margin:.1%}: decode more --tokens for a sure answer.")
    return " ".join(words)


def _kept(row: dict[str, Any], dense_layers: int) -> str:
    masses = row["mass_by_layer"]
    weakest = min(range(dense_layers, len(masses)), key=masses.__getitem__)
    more, error = row["perplexity_over_dense"] - 1, row["perplexity_over_dense_error"]
    return (
        f"keeps {masses[weakest]:.1%} in its weakest layer ({weakest}); its perplexity is {abs(more):.1%} "
        f"{'above' if more >= 0 else 'below'} dense attention's (standard error {error:.1%})"
    )
