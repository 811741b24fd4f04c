"""A long text as tokens, to cut windows from and to hide things in."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from .. import needles
from ..errors import InputError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path

    from ..models import Tokenizer

#: Bytes that are read of a text at most: tokenising more takes longer than it helps.
MAX_BYTES = 4_000_000
# Tokens that an insertion may move to stand at the end of a line.
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
        """A piece of the text that begins with a line: its tokens, and the places in it behind a line's end.

        Raises:
            InputError: the text is shorter than that.
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
    window: tuple[list[int], list[int]], pieces: Sequence[tuple[float, list[int]]]
) -> tuple[list[int], list[int]]:
    """Put pieces into a window, each at its depth (0 to 1), moved to the next line's end where there is one nearby.

    Returns:
        The tokens, and where in them each piece begins.
    """
    tokens, line_starts = window
    result: list[int] = []
    begins, taken = [0] * len(pieces), 0
    for i in sorted(range(len(pieces)), key=lambda i: pieces[i][0]):
        depth, piece = pieces[i]
        place = int(depth * len(tokens))
        after = bisect.bisect_left(line_starts, place)
        if after < len(line_starts) and line_starts[after] < place + _LINE_SEARCH:
            place = line_starts[after]
        place = max(place, taken)
        result += tokens[taken:place]
        begins[i] = len(result)
        result += piece
        taken = place
    return result + tokens[taken:], begins


def read_text(path: Path | None, tokenizer: Tokenizer) -> Text:
    """The text of a file, or the standard library's sources; at most its first :data:`MAX_BYTES` bytes.

    Raises:
        InputError: the file cannot be read, or there is nothing in it.
    """
    if path is None:
        content, name = needles.standard_library_text(MAX_BYTES), "the Python standard library"
    else:
        try:
            with path.open("rb") as file:
                content, name = file.read(MAX_BYTES), path.name
        except OSError as error:
            raise InputError(f"--text {path} cannot be read: {error.strerror}") from error
    if not content:
        raise InputError(f"the text ({name}) is empty: give another --text")
    return Text(content.decode(errors="replace"), tokenizer, name)
