"""The page docs/models.md from the verdicts of the sweep: ``PYTHONPATH=tests python -m helpers.support_table``."""

import re
from pathlib import Path

import torch
import transformers

from .sweep import EQUAL, NOT_BUILT, REFUSED, Verdict, verdict
from .tiny_models import CAUSAL_LM_TYPES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = "PYTHONPATH=tests python -m helpers.support_table"
SECTIONS = {
    EQUAL: (
        "Equal to dense",
        "Layers are counted by how they decode: sparse; dense, for a sliding window or logit soft-capping; or no keys, "
        "for a state or nothing. A layer with keys beside a state counts by its keys.",
        "layers",
    ),
    REFUSED: ("Refused", "`enable_quest` raises a ValueError with this reason.", "reason"),
    NOT_BUILT: ("Not built", "transformers builds no small model of these types from the sweep's settings.", "reason"),
}


def page(verdicts, version):
    """The page, from the verdicts on all types and the version of transformers."""
    by_result = {result: [row for row in verdicts if row.result == result] for result in SECTIONS}
    lines = [
        "# Models",
        "",
        f"The sweep of the tests builds a small random model of each of the {len(verdicts)} types of causal language "
        f"model in transformers {version}. "
        + "; ".join(f"{len(rows)} are {result}" for result, rows in by_result.items())
        + ".",
        "",
        "Each model generates under a budget that holds everything, from one row and from a batch with left padding. "
        "It must give the tokens and logits of dense attention. Under a smaller budget its sparse layers must read "
        "fewer pages than they hold. A model that cannot is refused when `enable_quest` makes the cache.",
        "",
        "A checkpoint decides by its own head_dim, windows and kinds of layers, which may differ from the small "
        "model's. `cache.plan()` tells how its layers decode.",
        "",
        f"`{COMMAND}` writes this page, and `tests/transformers/test_sweep.py` holds it to the models.",
    ]
    for result, (title, note, column) in SECTIONS.items():
        lines += ["", f"## {title}", "", note, "", f"| type | {column} |", "|---|---|"]
        lines += [f"| {row.model_type} | {row.detail} |" for row in by_result[result]]
    return "\n".join(lines) + "\n"


def read():
    """The verdicts of the committed page by type, and its version of transformers."""
    text = PAGE.read_text()
    verdicts, result = {}, None
    titles = {title: result for result, (title, _, _) in SECTIONS.items()}
    for line in text.splitlines():
        if line.startswith("## "):
            result = titles[line[3:]]
        elif result and (row := re.fullmatch(r"\| (\S+) \| (.*) \|", line)) and row[1] != "type":
            verdicts[row[1]] = Verdict(row[1], result, row[2])
    return verdicts, re.search(r"in transformers (\S+?)\. ", text)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page([verdict(model_type) for model_type in CAUSAL_LM_TYPES], transformers.__version__))
