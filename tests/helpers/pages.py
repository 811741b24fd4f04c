"""The pages of the project and their fenced blocks, with what it takes to run the commands in them."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "eval/README.md", "csrc/cuda/README.md")
        ),
        ROOT / "eval" / "quest_eval" / "bundled_model" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
#: What a block may need that tests do not have. `<!-- not run: GPU -->` stands on the line before such a block.
REASONS = ("GPU", "download", "server")

_BLOCK = re.compile(r"(?:<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why tests do not run it, if they do not."""

    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(language, text, reason or None) for reason, language, text in _BLOCK.findall(page.read_text())]


# The commands of the pages run as printed in a clone, by a shell that finds these programs first.
_QUEST_EVAL = """
import os, sys
small = {
    "run": "--lengths 1100 --tries 1 --budgets 64 --scored 4 --needles 2 --batch 1 --prefills 0 --device cpu",
    "advise": "--length 600 --tokens 2 --budgets 64 --prefills 0 --device cpu",
    "demo": "--tokens 1500 --facts 2 --budgets 64 --device cpu",
}
arguments = sys.argv[1:]
os.execv(sys.executable, [sys.executable, "-m", "quest_eval", *arguments, *small[arguments[0]].split()])
"""
_PIP = """
import os, shutil, subprocess, sys
from pathlib import Path
arguments = sys.argv[1:]
assert arguments[0] == "install", arguments
dry = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation"]
status = subprocess.run([sys.executable, "-m", "pip", *arguments, *dry]).returncode
if status == 0 and "--target" in arguments:
    import quest_ops
    from quest_ops import _library
    folder = Path(arguments[arguments.index("--target") + 1], "quest_ops")
    shutil.copytree(Path(quest_ops.__file__).parent, folder)
    for stem in ("_C", "_C_cuda"):
        if library := _library._find(stem):
            shutil.copy(library, folder)
sys.exit(status)
"""


def run_commands(page: Path, folder: Path, replaced: dict[str, str], files: dict[str, str]) -> None:
    """Run the shell blocks of a page in order, each in the top folder of a clone of this repository.

    `make` says what it would do, `pip` resolves and makes no change, and quest-eval runs on the CPU at small sizes.

    Args:
        page: the page.
        folder: an empty folder.
        replaced: placeholders of the page and what stands for them.
        files: the name and text of files that the page takes for granted in the clone.

    Raises:
        AssertionError: a command failed; the message has its output.
    """
    programs = folder / "bin"
    programs.mkdir()
    interpreter = sys.executable
    for name, code in {"quest-eval": _QUEST_EVAL, "pip": _PIP}.items():
        (folder / f"{name}.py").write_text(code)
        (programs / name).write_text(f'#!/bin/sh\nexec "{interpreter}" "{folder}/{name}.py" "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec "{interpreter}" "$@"\n')
    (programs / "make").write_text(f'#!/bin/sh\nexec "{shutil.which("make")}" -n "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)

    clone = folder / "quest_ops"
    changed = subprocess.run(
        ["git", "ls-files", "-m", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    given = folder / "given"  # uncommitted changes, and what the page takes for granted
    for name in changed.splitlines():
        if (ROOT / name).is_file():
            (given / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, given / name)
    for name, text in {".venv/bin/activate": "", **files}.items():
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_text(text)

    script = ["set -e"]
    texts = [block.text for block in blocks(page) if block.language == "sh" and block.reason is None]
    if not any("git clone" in text for text in texts):
        script.append(f'git clone -q "{ROOT}" "{clone}"; cp -r "{given}/." "{clone}"')
    for text in texts:
        for placeholder, value in replaced.items():
            text = text.replace(placeholder, value)
        place = f'cd "{folder}"' if "git clone" in text else f'cd "{clone}"'
        after = f'cp -r "{given}/." "{clone}"' if "git clone" in text else ""
        script.append(f"{place}\nset -x\n{text}\n{{ set +x; }} 2>/dev/null\n{after}")
    # Nothing of a `make` or an environment around the tests must reach those of the page.
    dropped = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "QUEST_CUDA", "CUDAARCHS", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"  # the models are small: threads would wait for each other
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
