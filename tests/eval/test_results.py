"""Results as tables and plots, those in the repository among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from quest_eval import plots, policies
from quest_eval.results.cells import read
from quest_eval.results.tables import markdown

LENGTHS, BUDGETS = (1024, 2048), (64, 128)
ROOT = Path(__file__).parents[2]
# Those of bench/selection_study.py have a plot of their own and no curves.
MEASURED = [
    path
    for path in sorted((ROOT / "bench/results/evaluation").glob("*.json"))
    if path.stem != "emulation" and not path.stem.startswith("selection")
]


def cells(names: list[str], task: str = "needles", metric: str = "accuracy") -> list[dict[str, Any]]:
    found = []
    for name in names:
        for budget in (None,) if name == "dense" else BUDGETS:
            for length in LENGTHS:
                cell = {"task": task, "metric": metric, "length": length, "policy": name, "budget": budget}
                cell |= {"label": policies.make(name, budget).label(), "value": (budget or 256) / 256, "error": 0.05}
                cell |= {"tries": 4, "depths": [(0.1, 0.5, 2), (0.9, 1.0, 2)], "curve": [(500, 2.0), (600, 3.0)]}
                found.append(cell)
    return found


def test_a_table_in_markdown() -> None:
    found = [cell for cell in cells(["dense", "quest"]) if (cell["length"], cell["budget"]) != (2048, 128)]
    assert markdown(found) == (
        "| needles, accuracy at 1,024 / 2,048 tokens | 64 | 128 |\n"
        "| --- | --- | --- |\n"
        "| dense | 1.00 / 1.00 | 1.00 / 1.00 |\n"
        "| Quest, max | 0.25 / 0.25 | 0.50 /  |\n"
    )


@pytest.mark.parametrize("names", [["dense"], ["dense", "quest", "h2o"], list(policies.NAMES)])
def test_pictures_of_few_and_of_all_policies(names: list[str], tmp_path: Any) -> None:
    found = cells(names) + cells(names, "perplexity", "perplexity")
    written = plots.draw(found, tmp_path)
    wanted = {"needles-depth.png", "perplexity-depth.png", "needles-position.png", "perplexity-position.png"}
    assert set(written) == wanted | ({"needles-budget.png", "perplexity-budget.png"} if len(names) > 1 else set())
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in written)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_plots_of_the_measurements(path: Path, tmp_path: Path) -> None:
    written = plots.draw(read(path), tmp_path)
    assert f"{read(path)[0]['task']}-budget.png" in written
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in written)
