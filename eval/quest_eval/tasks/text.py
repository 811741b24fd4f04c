"""A long text as tokens: windows are cut from it, and lines are hidden in them."""

from __future__ import annotations

import bisect
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from ..models import Tokenizer

#: The most bytes that are read of a text. Tokenising more costs time and adds nothing.
MAX_BYTES = 4_000_000
# The most tokens by which an insertion moves to the end of a line.
_LINE_SEARCH = 256


class Text:
    """A text and where its lines end."""

    def __init__(self, text: str, tokenizer: Tokenizer, name: str) -> None:
        self.text, self.name = text, name
        self.tokens = tokenizer.encode(text)
        ends = {token for token in set(self.tokens) if tokenizer.decode([token]).endswith("\n")}
        #: Places behind a line's end, ascending.
        self.line_starts = [i + 1 for i, token in enumerate(self.tokens) if token in ends]

    def window(self, num_tokens: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """A section of the text that begins with a line: its tokens, and the places in it behind a line's end.

        Raises:
            InputError: the text is shorter.
        """
        last = len(self.tokens) - num_tokens
        if last < 0:
            raise InputError(
                f"the text ({self.name}) has {len(self.tokens)} tokens where {num_tokens} are needed: give a longer "
                "--text or smaller --lengths"
            )
        start = rng.randint(0, last)
        i = bisect.bisect_right(self.line_starts, start) - 1
        start = self.line_starts[i] if i >= 0 else 0
        first, end = (bisect.bisect_right(self.line_starts, place) for place in (start, start + num_tokens))
        return self.tokens[start : start + num_tokens], [place - start for place in self.line_starts[first:end]]


def insert(
    window: tuple[list[int], list[int]], insertions: Sequence[tuple[float, list[int]]]
) -> tuple[list[int], list[int]]:
    """Insert tokens into a window, each list at its depth (0 to 1), or at the next line's end where one is nearby.

    Returns:
        The tokens, and where in them each insertion begins.
    """
    tokens, line_starts = window
    result: list[int] = []
    begins, taken = [0] * len(insertions), 0
    for i in sorted(range(len(insertions)), key=lambda i: insertions[i][0]):
        depth, inserted = insertions[i]
        place = int(depth * len(tokens))
        after = bisect.bisect_left(line_starts, place)
        if after < len(line_starts) and line_starts[after] < place + _LINE_SEARCH:
            place = line_starts[after]
        place = max(place, taken)
        result += tokens[taken:place]
        begins[i] = len(result)
        result += inserted
        taken = place
    return result + tokens[taken:], begins


def read_text(path: Path | None, tokenizer: Tokenizer) -> Text:
    """The text of a file, or the standard library's sources; at most its first :data:`MAX_BYTES` bytes.

    Raises:
        InputError: the file cannot be read, or is empty.
    """
    content, name = read_bytes(path, MAX_BYTES)
    if not content:
        raise InputError(f"the text ({name}) is empty: give another --text")
    return Text(content.decode(errors="replace"), tokenizer, name)


def read_bytes(path: Path | None, most: int) -> tuple[bytes, str]:
    """The first ``most`` bytes of a file, or of the standard library's sources, and the name of the text.

    Raises:
        InputError: the file cannot be read.
    """
    if path is None:
        return standard_library_text(most), "the Python standard library"
    try:
        with path.open("rb") as file:
            return file.read(most), path.name
    except OSError as error:
        raise InputError(f"--text {path} cannot be read: {error.strerror}") from error


def standard_library_text(num_bytes: int) -> bytes:
    """The sources of the running Python's standard library, in the order of their paths."""
    sources, missing = [], num_bytes
    for path in standard_library_files():
        if missing <= 0:
            break
        sources.append(path.read_bytes())
        missing -= len(sources[-1])
    return b"".join(sources)[:num_bytes]


def standard_library_files() -> list[Path]:
    """The source files of the running Python's standard library: modules, then packages, by their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))
    return [path for path in paths if "site-packages" not in path.parts]
