"""The pictures: nothing is cut off or squeezed, and no two policies look alike."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from quest_eval.plots import curves, maps, pages, style

POLICIES = [
    "dense", "quest", "quest-int8", "quest,sink_pages=1", "quest-int8,sink_pages=1", "h2o", "tova", "streaming",
    "snapkv", "sparq", "summary", "my_module:Mine", "page-oracle", "token-oracle",
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a plot and returns its figure, laid out."""
    figures = []
    for module in (curves, maps, pages):
        monkeypatch.setattr(module, "save", lambda figure, _: figures.append(figure))

    def draw(plot, *arguments):
        plot(*arguments, Path("unused"))
        FigureCanvasAgg(figures[-1]).draw()
        return figures[-1]

    return draw


def cells(policies, budgets=(64, 256), lengths=(1024,)):
    return [
        {
            "task": "perplexity", "metric": "perplexity", "length": length, "policy": policy,
            "label": f"label of {policy}", "budget": budget, "value": 2.0, "error": 0.1,
            "depths": [[0.05, 1.0, 2], [0.95, 0.5, 2]], "curve": [[900 + 2 * i, 2.0 + 0.1 * i] for i in range(30)],
        }
        for length in lengths
        for policy in policies
        for budget in ((None,) if policy == "dense" else budgets)
    ]  # fmt: skip


def inside(figure, artist):
    box, whole = artist.get_window_extent(), figure.bbox
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1


def test_no_two_policies_of_a_figure_look_alike():
    looks = [(s["color"], s.get("marker"), s.get("linestyle")) for s in style.lines(POLICIES).values()]
    assert len(set(looks)) == len(POLICIES)
    colours = [s["color"] for name, s in style.lines(POLICIES).items() if not style.is_reference(name)]
    assert len(set(colours)) == len(colours)


def test_a_policy_keeps_its_look_beside_others():
    few, many = style.lines(["quest", "h2o"]), style.lines(["my_module:Mine", *POLICIES])
    assert few["quest"] == many["quest"]
    assert few["h2o"] == many["h2o"]


@pytest.mark.parametrize("columns", [1, 3, 32])
def test_a_long_title_is_not_cut_off(columns, drawn):
    title = (
        "Attention mass kept: quest-int8,sink_pages=1,group_reduce=soft, 16,384 tokens of the Python standard library"
    )
    figure = drawn(maps.grid, torch.rand(4, columns), "layer", "budget", [str(i) for i in range(columns)], title)
    assert inside(figure, figure._suptitle)
    assert figure._suptitle.get_text().replace("\n", " ") == title


@pytest.mark.parametrize("others", [[], [100, 900]])
def test_the_panels_of_an_answer_fill_the_figure(others, drawn):
    counts = {layer: torch.ones(2, 64, dtype=torch.int64) for layer in (2, 3)}
    answer = pages.AnswerPages(counts, 4, 16, 1024, 5, 1000)
    figure = drawn(pages.pages_of_answer, answer, (500, 535), others, "title")
    whole, near, _ = figure.axes
    for axes in (whole, near):
        assert axes.get_position().height > 0.25
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [
            "layer 0", "layer 1", "layer 2, KV head 0", "KV head 1", "layer 3, KV head 0", "KV head 1",
        ]  # fmt: skip


def test_colours_of_pages_over_time_are_explained(drawn):
    figure = drawn(pages.pages_over_time, {2: torch.rand(5, 30), 3: torch.rand(5, 30)}, 16, "title")
    assert figure.axes[-1].get_ylabel() == "share of the layer's page lists that hold the page"


def test_a_panel_over_the_positions_has_one_policy(drawn):
    figure = drawn(curves.against_position, cells(["dense", "quest", "h2o"], lengths=(1024, 2048)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"label of {name}: {n:,} tokens" for n in (1024, 2048) for name in ("quest", "h2o")]
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert [line.get_label() for line in lines] == ["64", "256"]
        assert all(y == pytest.approx(1) for line in lines for y in line.get_ydata()), "these are dense attention's own"
    assert all(inside(figure, axes.title) for axes in figure.axes)


def test_positions_of_dense_alone_show_its_perplexity(drawn):
    (axes,) = drawn(curves.against_position, cells(["dense"])).axes
    assert axes.get_lines()[0].get_ydata()[0] > 2


@pytest.mark.parametrize("count", [1, 3])
def test_labels_of_depths_are_not_cut_off(count, drawn):
    figure = drawn(maps.depth_by_length, cells(["dense", "quest", "h2o"][:count], lengths=(600, 1024)))
    assert inside(figure, figure._supylabel)
    shown = {tuple(label.get_text() for label in axes.get_xticklabels()) for axes in figure.axes[:-1]}
    assert shown <= {(), ("600", "1K")}
    assert ("600", "1K") in shown
