"""The pages hold: their code and commands run, and the files, anchors, targets and names in them exist."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import quest_ops
import torch
from helpers.pages import PAGES, REASONS, ROOT, blocks, run_commands
from quest_ops.info import TRANSFORMERS

PYTHON = [
    pytest.param(block.text, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, block in enumerate(block for block in blocks(page) if block.language == "python")
    if block.reason is None
]
FOLDERS = ("bench", "csrc", "docs", "eval", "examples", "python", "tests", r"\.ci")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(text: str) -> str:
    """The fenced blocks and code spans of a page, one a line."""
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stands for the checkpoints that the pages name."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from helpers.checkpoint import CHAT, SIZES, save

    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    return save(model, tmp_path_factory.mktemp("checkpoint"), CHAT)


LONG_TEXT = "".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(60))


@pytest.mark.parametrize("code", PYTHON)
def test_code_runs(
    code: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long_text.txt").write_text(LONG_TEXT)
    code = code.replace('"Qwen/Qwen3-0.6B"', repr(checkpoint))
    exec(compile(code, "<docs>", "exec"), {"__name__": "__docs__"})
    printed = capsys.readouterr().out
    for comment in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE):
        for figure in re.findall(r"[\d.]+%|\b[\d,]{3,}\b", comment):
            assert figure in printed, comment


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("git") is None or shutil.which("make") is None, reason="needs git and make")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language == "sh" for block in blocks(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)  # fmt: skip
def test_commands_run(page: Path, checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if shallow.strip() != "false":
        pytest.skip("needs a checkout with its history")
    mean_key = (ROOT / "eval" / "examples" / "mean_key.py").read_text()
    run_commands(
        page,
        tmp_path,
        {"URL_OF_THIS_REPOSITORY": str(ROOT), "PATH_OR_NAME": checkpoint},
        {"my_text.txt": LONG_TEXT, "my_module.py": mean_key.replace("MeanKey(", "MyPolicy(")},
    )


@each_page
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    found = blocks(page)
    assert len(found) == page.read_text().count("\n```") / 2, "a fence that the collector does not see"
    for block in found:
        assert block.language in {"python", "sh", "toml", "text", "bibtex"}, block.text
        assert block.reason is None or block.reason.split(",")[0] in REASONS, block.reason


def test_the_badges_are_true() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    first, last = re.findall(r"\d+\.\d+", TRANSFORMERS)
    major, minor = last.split(".")
    text = (ROOT / "README.md").read_text()
    assert 'requires-python = ">=3.10"' in project and "badge/python-3.10+-" in text
    assert 'dependencies = ["torch>=2.10"]' in project and "badge/torch-2.10+-" in text
    assert f"badge/transformers-{first}_to_{major}.{int(minor) - 1}-" in text
    assert 'license = "BSD-3-Clause"' in project and "badge/licence-BSD--3--Clause-" in text


def test_the_table_of_gpus_has_the_architectures_of_a_build() -> None:
    cmake = (ROOT / "cmake" / "FindCuda.cmake").read_text()
    (default,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES (.*)\)", cmake)
    rows = re.findall(r"^\| \w+ \| [^|]* \| (\d+a?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == [architecture.removesuffix("-real") for architecture in default.split()]


def test_the_api_reference_has_all_public_names(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    (modules,) = re.findall(r"^API := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    names = modules.replace("\\", "").split()
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*names, output_directory=tmp_path)
    for name in names:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        for public in getattr(importlib.import_module(name), "__all__", ()):
            assert f'id="{public}"' in page, f"{name}.{public}"
        assert not re.search(r":(func|class|meth|mod|data):", page), name


@each_page
def test_links(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text())
    missing = []
    for link, anchor in links:
        target = page.parent / link if link else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(f"{link}#{anchor}" if anchor else link)
    assert not missing


@each_page
def test_paths(page: Path) -> None:
    paths = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*)", code(page.read_text()))
    missing = [path for path in paths if not (ROOT / path.rstrip(".")).exists()]
    assert not missing


@each_page
def test_make_targets(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = re.findall(r"(?:^|[^\w-])make ([a-z]+(?:-[a-z]+)*)\b", code(page.read_text()))
    assert set(named) <= targets, set(named) - targets


def names_of_section(heading: str) -> set[str]:
    """The names in the first columns of the tables of a section of docs/api.md."""
    page = (ROOT / "docs" / "api.md").read_text()
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("package", ["quest_ops", "quest_ops.transformers"])
def test_the_api_page_has_all_public_names(package: str) -> None:
    assert names_of_section(package) == set(importlib.import_module(package).__all__)


def test_the_api_page_has_all_methods_of_the_cache() -> None:
    public = {name for name in dir(quest_ops.PagedKVCache) if not name.startswith("_")}
    assert names_of_section("PagedKVCache") == public - {"counts"}  # None until start_report, and the report's own
