"""The pages hold: their Python runs, and the files, anchors and make targets that they name exist."""

import importlib
import re
from pathlib import Path

import pytest
import quest_ops

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
FOLDERS = ("bench", "csrc", "docs", "eval", "examples", "python", "tests", r"\.ci")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code(text: str) -> str:
    """The fenced blocks and code spans of a page, one a line."""
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<docs>", "exec"), {"__name__": "__docs__"})


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
