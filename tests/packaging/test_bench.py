"""The scripts of bench/ that need no GPU: tables from the JSON, and the comparison of two builds."""

import importlib.resources
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("tables", monkeypatch)


@pytest.fixture
def compare_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("compare_speed", monkeypatch)


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="there is triton")
def test_kernels_without_triton_end_in_a_sentence() -> None:
    done = subprocess.run([sys.executable, BENCH / "kernels.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("the scripts of bench/ time kernels on a GPU with triton")
    assert done.stderr.count("\n") == 1


def test_committed_tables() -> None:
    subprocess.run([sys.executable, BENCH / "tables.py", "--check"], check=True)


def test_tables_are_used(tables: ModuleType) -> None:
    pages = [(ROOT / "README.md").read_text(), *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    for name in tables.TABLES:
        assert any(f"<!-- table: {name} -->" in page for page in pages), name


def test_the_plot_of_selections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    study = load("selection_study", monkeypatch)
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda *points, label, **_: drawn.append((label, *points[1:])))
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda *_, **__: None)
    study.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    cells = json.loads((BENCH / "results" / "evaluation" / "selection-loss.json").read_text())["cells"]
    (cell,) = (cell for cell in cells if (cell["policy"], cell["budget"]) == ("quest-default", 256))
    label, shares, losses = drawn[list(study.DRAWN).index("quest-default")]
    assert label == "default" and len(shares) == 4
    assert shares[0] == pytest.approx(100 * cell["kv_bytes_read"] / cell["kv_bytes_dense"])
    assert losses[0] == pytest.approx(cell["value"] - 1)


def test_each_suite_has_its_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    study = load("selection_study", monkeypatch)
    for name, suite in study.SUITES.items():
        cells = json.loads((study.RESULTS / f"selection-{name}.json").read_text())["cells"]
        tasks = list(itertools.takewhile(lambda option: not option.startswith("--"), suite.options))
        of_policies = {(policy, budget) for policy, budgets in suite.policies.items() for budget in budgets}
        wanted = itertools.product(tasks, {("dense", None), *of_policies})
        found = [(cell["task"], (cell["policy"], cell["budget"])) for cell in cells]
        assert sorted(found, key=repr) == sorted(wanted, key=repr), name


def test_merged_results_have_each_cell_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = load("selection_study", monkeypatch)
    keys = [("needles", "dense", None), ("loss", "dense", None), ("needles", "quest", 64), ("needles", "quest", 128)]
    cells = [dict(zip(("task", "policy", "budget"), key, strict=True)) | {"value": i} for i, key in enumerate(keys)]
    for folder, some in (("a", cells[:3]), ("b", [cells[0] | {"curve": [1]}, cells[3]])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps({"settings": {"tries": 2}, "cells": some}))
    study.merge([tmp_path / "a", tmp_path / "not run", tmp_path / "b"], tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {"settings": {"tries": 2}, "cells": cells}


@pytest.mark.parametrize("name", ["selection", "selection-long", "rivals"])
def test_tables_of_the_evaluation_follow_the_json(
    tables: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = tables.TABLES[name]()
    assert all(len(row) == len(before[0]) for row in before)
    shutil.copytree(BENCH / "results" / "evaluation", tmp_path / "evaluation")
    for path in (tmp_path / "evaluation").glob("*.json"):
        path.write_text(path.read_text().replace('"value": 0.', '"value": 1.'))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES[name]() != before


def test_table_follows_the_json(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tables.filled("before\n<!-- table: steps -->\n<!-- /table -->\nafter\n")
    assert page.startswith("before\n") and page.endswith("<!-- /table -->\nafter\n")
    result = tables.read("kernels-h100.json")
    (row,) = (row for row in result["rows"] if row["workload"]["name"] == "32/8 B 32, 32768, 2048")
    step, dense, roofline = (row["microseconds"][name]["median"] for name in ("pipeline", "cuDNN", "limit"))
    figures = f"{step:.1f} us | {dense:.1f} us | {dense / step:.1f}x | {roofline:.1f} us"
    assert f"| 32/8, 32, 32K, 2048 | {figures} |" in page
    assert tables.filled(page.replace(f"{step:.1f}", "1.5")) == page

    result["rows"][0]["microseconds"]["pipeline"]["median"] += 1
    (tmp_path / "kernels-h100.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.filled(page) != page


@pytest.mark.parametrize(
    ("texts", "found"), [(["a, 1"], {"a, 1"}), (["a"], {"a, 1", "a, 1, x"}), (["x", "b"], {"a, 1, x", "b"})]
)
def test_named_workloads(texts: list[str], found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    named = load("workloads", monkeypatch).named
    assert named(["a, 1", "a, 1, x", "b"], texts) == found
    with pytest.raises(ValueError, match="no workload is named 'c'"):
        named(["a, 1", "b"], ["c"])


def result(step: float, roofline: float = 10.0) -> dict[str, object]:
    """A result of kernels.py, of one workload and one selection."""
    times = {"estimate": 5.0, "pipeline": step, "limit": roofline, "cuDNN": 50.0}
    return {
        "topk": [{"rows": 32, "n": 64, "k": 8, "microseconds": {"topk_pages": {"median": 3.0}}}],
        "rows": [{"workload": {"name": "w"}, "microseconds": {name: {"median": time} for name, time in times.items()}}],
    }


def test_compare_speed_rows(compare_speed: ModuleType) -> None:
    old, new = [result(20.0), result(99.0), result(19.0)], [result(20.5, 20.0), result(20.8, 20.0), result(1.0, 20.0)]
    rows = {(row.workload, row.operator): row for row in compare_speed.compare(old, new)}
    assert set(rows) == {("topk_pages: 32 x 64, 8", "topk_pages"), ("w", "estimate"), ("w", "pipeline"), ("w", "limit")}
    assert rows["w", "pipeline"].ratio == pytest.approx(20.5 / 20)
    assert not any(row.slower for row in rows.values())  # the read roofline is no row to fail
    assert next(
        row for row in compare_speed.compare([result(20.0)], [result(20.7)]) if row.operator == "pipeline"
    ).slower


def checkout(folder: Path) -> Path:
    """A folder with a copy of the package and its libraries."""
    package = importlib.resources.files("quest_ops")
    target = folder / "python" / "quest_ops"
    shutil.copytree(ROOT / "python" / "quest_ops", target, ignore=shutil.ignore_patterns("__pycache__", "model"))
    for name in ("_C.so", "_C_cuda.so"):
        if (library := package / name).is_file():
            shutil.copy(str(library), target / name)
    return folder


def test_compare_speed_loads_each_checkout(compare_speed: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport quest_ops\nfrom quest_ops import _library\n"
        "print(quest_ops.__file__, _library._cpu_path, *sys.argv[1:], sep='\\n')\n"
    )
    folder = checkout(tmp_path / "old")
    command = compare_speed.command(folder, script, "--quick")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    package = folder / "python" / "quest_ops"
    assert output.split("\n")[:3] == [str(package / "__init__.py"), str(package / "_C.so"), "--quick"]


@pytest.mark.parametrize(("step", "status"), [(10.0, 0), (11.0, 1)])
def test_compare_speed_ends(step: float, status: int, tmp_path: Path) -> None:
    """The whole driver, with a script in place of kernels.py whose times the checkout decides."""
    bench = tmp_path / "bench"
    bench.mkdir()
    shutil.copy(BENCH / "compare_speed.py", bench)
    (bench / "kernels.py").write_text(
        "import json, sys\nfrom pathlib import Path\nimport quest_ops\n"
        "times = {name: {'median': time} for name, time in (('pipeline', quest_ops.TIME), ('limit', 5.0))}\n"
        "row = {'workload': {'name': ' '.join(sys.argv[1:-2])}, 'microseconds': times}\n"
        "result = {'machine': {'gpu': 'none'}, 'topk': [], 'rows': [row]}\n"
        "Path(sys.argv[-1]).write_text(json.dumps(result))\n"
    )
    for name, time in (("old", 10.0), ("new", step)):
        package = tmp_path / name / "python" / "quest_ops"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"TIME = {time}\n")
        (package / "_C.so").touch()
    command = [sys.executable, bench / "compare_speed.py", tmp_path / "old", tmp_path / "new"]
    command += ["--rounds", "2", "--out", tmp_path / "out.json", "--only", "32/8 B 1"]

    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 2 and "_C_cuda.so is missing" in refused.stderr

    for name in ("old", "new"):
        (tmp_path / name / "python" / "quest_ops" / "_C_cuda.so").touch()
    compared = subprocess.run(command, check=False, capture_output=True, text=True)
    assert compared.returncode == status, compared.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"] == {"gpu": "none"}
    assert written["rows"][0] == {
        "workload": "--no-peers --only 32/8 B 1",
        "operator": "pipeline",
        "old": [10.0, 10.0],
        "new": [step, step],
        "ratio": step / 10,
    }
    assert ("slower" in compared.stdout) == (status == 1)
