"""Mutation testing of the C++ checks: each comparison in them is flipped, and the table of bad input must notice.

All mutants are built into one CPU library. A comparison ``a < b`` becomes ``a < flip_7 > b``, whose operators have the
precedence of the one that they replace. The environment variable QUEST_FLIP then names the flip that is on.

    python tests/mutation/flip_checks.py --out tests/mutation/flip_checks.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HEADERS = ("check_tensors.h", "check_values.h", "checks.h")
#: What each comparison may become.
FLIPS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
}
#: Tests, and those of them, that run where the tables notice nothing.
LATER_TESTS = {
    "test_bad_input.py": "most and cpu and not step",
    "test_append_kv.py": "cpu",
    "test_topk_pages.py": "cpu",
}
SECONDS = 240  # for all calls of a mutant; a flipped loop may never end

FLIP_HEADER = """
#pragma once
#include <cstdlib>

namespace quest {

enum class Op { lt, le, gt, ge, eq, ne };

inline int flipped() {
  const char* id = std::getenv("QUEST_FLIP");
  return id ? std::atoi(id) : -1;
}

// Op of the source, and the flips [first, first + count) of it.
template <Op op, int first, Op flip, Op other>
struct Flip {};
// Constants

template <class A, class F>
struct Left {
  const A& a;
};

template <class A, class B>
bool compare(Op op, const A& a, const B& b) {
  switch (op) {
    case Op::lt: if constexpr (requires { a < b; }) return a < b; break;
    case Op::le: if constexpr (requires { a <= b; }) return a <= b; break;
    case Op::gt: if constexpr (requires { a > b; }) return a > b; break;
    case Op::ge: if constexpr (requires { a >= b; }) return a >= b; break;
    case Op::eq: return a == b;
    case Op::ne: return a != b;
  }
  return false;
}

template <class A, class B, Op op, int first, Op flip, Op other>
bool choose(const Left<A, Flip<op, first, flip, other>>& left, const B& b) {
  const int on = flipped();
  return compare(on == first ? flip : on == first + 1 && flip != other ? other : op, left.a, b);
}

template <class A, Op op, int first, Op flip, Op other>
Left<A, Flip<op, first, flip, other>> operator<(const A& a, Flip<op, first, flip, other>) { return {a}; }
template <class A, Op op, int first, Op flip, Op other>
Left<A, Flip<op, first, flip, other>> operator==(const A& a, Flip<op, first, flip, other>) { return {a}; }
template <class A, class F, class B>
bool operator>(const Left<A, F>& left, const B& b) { return choose(left, b); }
template <class A, class F, class B>
bool operator==(const Left<A, F>& left, const B& b) { return choose(left, b); }

}  // namespace quest
"""


class Mutant(NamedTuple):
    number: int
    header: str
    line: int
    source: str
    flip: str


NAMES = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


def instrument(csrc: Path) -> list[Mutant]:
    """Make every comparison of the headers one that can be flipped; loops and template arguments stay."""
    mutants: list[Mutant] = []
    constants: list[str] = []
    for header in HEADERS:
        lines = (csrc / header).read_text().splitlines()
        for i, line in enumerate(lines):
            code = line.split("//")[0]
            if re.match(r"\s*(for \(|#|template)", code):
                continue

            def flippable(match: re.Match[str], number: int = i, line: str = line, header: str = header) -> str:
                op = match[1]
                flips = FLIPS[op]
                first = len(mutants)
                mutants.extend(
                    Mutant(first + n, header, number + 1, line.strip(), f"{op} -> {flip}")
                    for n, flip in enumerate(flips)
                )
                kinds = ", ".join(f"Op::{NAMES[x]}" for x in (flips[0], flips[-1]))
                constants.append(f"inline constexpr Flip<Op::{NAMES[op]}, {first}, {kinds}> flip_{first};")
                tag = f"flip_{first}"  # a template argument list would have commas, and most places are macros
                return f" == {tag} == " if op in ("==", "!=") else f" < {tag} > "

            # Text in quotes is a message.
            pieces = re.split(r'("(?:[^"\\]|\\.)*")', code)
            pieces[::2] = [re.sub(r" (<=|>=|==|!=|<|>) ", flippable, piece) for piece in pieces[::2]]
            lines[i] = "".join(pieces)
        text = "\n".join(lines).replace("#pragma once", '#pragma once\n#include "flip.h"', 1)
        (csrc / header).write_text(text + "\n")
    (csrc / "flip.h").write_text(FLIP_HEADER.replace("// Constants", "\n".join(constants)))
    return mutants


def build(folder: Path) -> list[Mutant]:
    """Build the CPU library with all mutants in ``folder``."""
    for name in ("CMakeLists.txt", "pyproject.toml", "cmake", "csrc"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy(source, folder)
    mutants = instrument(folder / "csrc")
    options = [
        "-D",
        "QUEST_CUDA=OFF",
        "-D",
        "CMAKE_CXX_FLAGS=-Wno-sign-compare",
        "-D",
        f"Python_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(
        ["cmake", "-G", "Ninja", "-S", folder, "-B", folder / "build", *options], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(["cmake", "--build", folder / "build"], check=True, stdout=subprocess.DEVNULL)
    return mutants


def load(folder: Path) -> None:
    """Import quest_ops with the library of a folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from helpers.other_library import use_library

    use_library(folder)
    torch.set_num_threads(1)
    from quest_ops import _library

    assert _library._find("_C") == folder / "_C.so"


def first_failure() -> str | None:
    """The first call of the tables, or test of the limits, that goes otherwise than it should."""
    import pytest
    from helpers.bad_inputs import ACCEPTED, BAD_INPUTS
    from operators.test_bad_input_table import expected, first_error

    for case in (*ACCEPTED, *BAD_INPUTS):
        wanted, found = expected(case, "cpu"), first_error(case.operator, case.arguments("cpu")[1])
        if found != wanted:
            return f"{case.operator}: {found} instead of {wanted}"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:timeout", "-o", "timeout=0", "--rootdir", str(ROOT)]
    for file, words in LATER_TESTS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            failed = pytest.main([*options, "-k", words, str(ROOT / "tests" / "operators" / file)])
        if failed:
            return f"a test of {file}"
    return None


def outcome(mutant: Mutant | None) -> tuple[str, str]:
    """Run the tables in a process of its own. Returns the outcome and the first difference."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        if mutant is not None:
            os.environ["QUEST_FLIP"] = str(mutant.number)
        os.environ["QUEST_OPS_TEST_EXAMPLES"] = "3"
        os.write(writer, (first_failure() or "").encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed", f"the process ended by signal {os.WTERMSIG(status)}"
    return ("killed", text) if text else ("survived", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="mutants to try; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--out", type=Path, help="a JSON for the summary")
    parser.add_argument("--folder", type=Path, help="where to build; a temporary folder by default")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        mutants = build(folder)
        load(folder / "build")
        result, text = outcome(None)
        if result != "survived":
            raise SystemExit(f"the tables fail without a mutant: {text}")
        chosen = mutants
        if options.sample is not None and options.sample < len(mutants):
            chosen = sorted(random.Random(options.seed).sample(mutants, options.sample))
        explained = json.loads((Path(__file__).parent / "flip_checks_explained.json").read_text())
        survivors = []
        for mutant in chosen:
            result, text = outcome(mutant)
            print(f"{result} {mutant.header}:{mutant.line} {mutant.flip}  {mutant.source}  {text[:100]}", flush=True)
            if result == "survived":
                why = explained.get(f"{mutant.header}: {mutant.source}: {mutant.flip}")
                survivors.append({**mutant._asdict(), "why": why})
    summary = {
        "command": "python tests/mutation/flip_checks.py " + " ".join(sys.argv[1:]),
        "mutants": len(mutants),
        "tried": len(chosen),
        "killed": len(chosen) - len(survivors),
        "explained": sum(survivor["why"] is not None for survivor in survivors),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "survivors": survivors,
    }
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{summary['killed']} of {summary['tried']} killed; {summary['explained']} of {len(survivors)} others explained"
    )
    sys.exit(any(survivor["why"] is None for survivor in survivors))


if __name__ == "__main__":
    main()
