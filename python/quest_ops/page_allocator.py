"""The host's account of a paged cache: the pages that each sequence owns, and its length.

Plain Python that never touches the device. A length is kept as a lower and an upper bound. They differ only after a
step whose lengths were given on the device, since the host does not read them there.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class CacheFullError(RuntimeError):
    """The pool has too few free pages, or a sequence would outgrow ``max_tokens``. Nothing has changed."""


class NewPage(NamedTuple):
    """A page given to a sequence; ``copy_of`` is the shared page that it replaces, or None."""

    sequence: int
    logical: int
    page: int
    copy_of: int | None


class PageAllocator:
    """Owners of pages, and bounds on lengths.

    Forks share pages. A page with several owners must not be written.

    Args:
        sequences: B.
        num_pages: N, pages in the pool.
        page_size: S.
        max_tokens: the longest a sequence may become.
    """

    def __init__(self, sequences: int, num_pages: int, page_size: int, max_tokens: int) -> None:
        self.num_pages, self.page_size, self.max_tokens = num_pages, page_size, max_tokens
        self.free = list(range(num_pages - 1, -1, -1))
        self.owners = [0] * num_pages
        self.tables: list[list[int]] = [[] for _ in range(sequences)]
        self.low, self.high = [0] * sequences, [0] * sequences
        self._owned_from = [0] * sequences  # logical pages from this one on have a single owner

    def page_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def reserved_tokens(self, sequence: int) -> int:
        return min(len(self.tables[sequence]) * self.page_size, self.max_tokens)

    def shared(self, sequence: int, logical: int) -> bool:
        return self.owners[self.tables[sequence][logical]] > 1

    def plan(self, counts: list[int]) -> list[NewPage]:
        """Pages for each sequence's count of new tokens, and copies of the shared pages they would write.

        Nothing changes until ``take``.

        Raises:
            CacheFullError: the pages do not suffice.
        """
        wanted = self._missing_pages(counts)
        if len(wanted) > len(self.free):
            raise CacheFullError(
                f"out of pages: {len(wanted)} needed, {len(self.free)} of num_pages = {self.num_pages} are free; "
                f"free or crop a sequence, or make the cache with more pages"
            )
        pages = reversed(self.free)
        return [NewPage(b, logical, next(pages), old) for b, logical, old in wanted]

    def take(self, counts: list[int], new: list[NewPage]) -> None:
        """Give out the pages that ``plan(counts)`` returned."""
        for b, count in enumerate(counts):
            if count:
                self._owned_from[b] = min(self._owned_from[b], self.low[b] // self.page_size)
        for page in new:
            self._assign(page)

    def _missing_pages(self, counts: list[int]) -> list[tuple[int, int, int | None]]:
        missing: list[tuple[int, int, int | None]] = []
        given_up: Counter[int] = Counter()  # owners that get a copy; the last owner keeps the page
        for b, count in enumerate(counts):
            if count == 0:
                continue
            end, table = self.high[b] + count, self.tables[b]
            if end > self.max_tokens:
                inexact = "" if self.low[b] == self.high[b] else " (an upper bound: sync_lengths() may lower it)"
                raise CacheFullError(
                    f"sequence {b} must stay within max_tokens, {self.max_tokens}, got {self.high[b]} + {count} tokens"
                    + inexact
                )
            for logical in range(self.low[b] // self.page_size, min(self._owned_from[b], len(table))):
                page = table[logical]
                if self.owners[page] - given_up[page] > 1:
                    given_up[page] += 1
                    missing.append((b, logical, page))
            missing.extend((b, logical, None) for logical in range(len(table), self.page_count(end)))
        return missing

    def _assign(self, new: NewPage) -> None:
        table = self.tables[new.sequence]
        self.free.pop()
        self.owners[new.page] = 1
        if new.copy_of is None:
            table.append(new.page)
        else:
            self.owners[new.copy_of] -= 1  # shared, so it keeps an owner
            table[new.logical] = new.page

    def grow(self, low: list[int], high: list[int]) -> None:
        """Count new tokens, at least ``low`` and at most ``high``, whose pages are reserved."""
        self.low = [have + n for have, n in zip(self.low, low, strict=True)]
        self.high = [have + n for have, n in zip(self.high, high, strict=True)]

    def crop(self, sequence: int, tokens: int) -> None:
        """Keep ``tokens`` tokens of a longer sequence, and their pages."""
        keep, table = self.page_count(tokens), self.tables[sequence]
        self._disown(table[keep:])
        del table[keep:]
        self.low[sequence], self.high[sequence] = min(self.low[sequence], tokens), tokens

    def fork(self, source: int, target: int) -> None:
        """Let ``target`` share the pages that hold tokens of ``source``."""
        count = self.page_count(self.high[source])
        pages = self.tables[source][:count]
        for page in pages:
            self.owners[page] += 1
        self.release(target)
        self.tables[target] = pages
        self.low[target], self.high[target] = self.low[source], self.high[source]
        self._owned_from[source] = self._owned_from[target] = count

    def release(self, sequence: int) -> None:
        """Forget a sequence and give its pages back."""
        self._disown(self.tables[sequence])
        self.tables[sequence] = []
        self.low[sequence] = self.high[sequence] = self._owned_from[sequence] = 0

    def _disown(self, pages: list[int]) -> None:
        for page in reversed(pages):  # the free list is a stack: the first page is taken next
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self.free.append(page)
