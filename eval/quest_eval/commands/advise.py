"""``quest-eval advise``: the attention mass that each budget keeps on a text, and a recommended budget."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from .. import models, tasks
from ..decoding.observers import Recall
from ..decoding.policy_decoder import PolicyDecoder
from ..errors import InputError
from ..plots import maps
from ..tasks.text import read_text
from .checks import check_lengths, make_folder, make_policies, make_store

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Options:
    model: str = models.BUNDLED
    text: Path | None = None
    target: float = 0.99
    budgets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    policy: str = "quest-int8"
    length: int = 4096
    tokens: int = 64
    device: str = "cpu"
    out: Path = Path("results/advise")
    page_size: int = 16
    dense_layers: int = 2
    prefills: float | None = None
    seed: int = 0


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measure, print a table, write ``advice.json`` and ``advice.png``; returns the content of the former.

    Raises:
        InputError: before any long work, for an argument that cannot be used.
    """
    if not 0 < options.target <= 1:
        raise InputError(f"--target must be above 0 and at most 1, got {options.target}")
    models.check_device(options.device)
    budgets = sorted(set(options.budgets))
    policies = make_policies((options.policy,), budgets, options.page_size, options.dense_layers)
    if policies[0].budget is None:
        raise InputError(f"--policy {options.policy} has no budget to advise on: name another")
    files = models.find(options.model)
    check_lengths((options.length,), files)
    text = read_text(options.text, files.tokenizer)
    setup = tasks.Setup(files.tokenizer, text, tries=1, seed=options.seed, scored=options.tokens)
    sample = tasks.make("perplexity", setup).samples(options.length)[0]
    store = make_store(options.prefills, options.device)
    make_folder(options.out)

    model = models.load(files, options.device, models.DTYPES[options.device])
    fingerprint = "" if store is None else models.fingerprint(model)
    decoder = PolicyDecoder(model, max_tokens=options.length + 1, store=store, fingerprint=fingerprint)
    if options.dense_layers >= decoder.num_layers:
        raise InputError(f"--dense-layers must be below the model's {decoder.num_layers}, got {options.dense_layers}")
    ids = torch.tensor([sample.ids])
    dense = make_policies(("dense",), budgets, options.page_size, options.dense_layers)[0]
    with console.status("reading the text"):
        decoder.prefill(ids[:, : -sample.tail], policies=[dense, *policies])
    tail = ids[:, -sample.tail :]
    dense_loss = -float(decoder.score(dense, tail).mean())
    rows: list[dict[str, Any]] = []
    for policy in policies:
        decoder.observer = recall = Recall()
        with console.status(f"decoding {sample.tail} tokens with a budget of {policy.budget}"):
            loss = -float(decoder.score(policy, tail).mean())
        kept = recall.by_head()
        rows.append(
            {
                "budget": policy.budget,
                "mass_by_layer": kept.mean(1).tolist(),
                "mass_by_layer_and_head": kept.tolist(),
                "weakest_layer": float(kept.mean(1)[policy.dense_layers :].min()),
                "perplexity": math.exp(loss),
            }
        )
    enough = [row["budget"] for row in rows if row["weakest_layer"] >= options.target]
    advice: dict[str, Any] = {
        "model": options.model,
        "text": text.name,
        "length": options.length,
        "tokens": sample.tail,
        "policy": options.policy,
        "page_size": options.page_size,
        "dense_layers": options.dense_layers,
        "target": options.target,
        "recommended_budget": enough[0] if enough else None,
        "dense_perplexity": math.exp(dense_loss),
        "budgets": rows,
    }
    (options.out / "advice.json").write_text(json.dumps(advice, indent=1) + "\n")
    masses = torch.tensor([row["mass_by_layer"] for row in rows]).T
    title = f"Attention mass kept: {options.policy}, {options.length:,} tokens of {text.name}"
    maps.grid(
        masses, "layer", "budget in tokens", [f"{budget}" for budget in budgets], title, options.out / "advice.png"
    )
    console.print(_table(advice))
    console.print(_sentence(advice, rows), highlight=False)
    return advice


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
    return table


def _sentence(advice: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if advice["recommended_budget"] is None:
        return (
            f"No budget keeps {advice['target']:.1%} in every layer: the largest, {rows[-1]['budget']:,}, keeps "
            f"{rows[-1]['weakest_layer']:.1%} in its weakest. Try larger --budgets or a lower --target."
        )
    return (
        f"Recommended budget: {advice['recommended_budget']:,} tokens, the smallest of these that keeps "
        f"{advice['target']:.1%} of the attention's weights in every sparse layer, as a mean over heads and tokens."
    )
