"""Looks for strings in the text of one stage, as its tokens come: stop strings, and a model's tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Reader(Protocol):
    """Reads the text of one sequence of tokens."""

    @property
    def fresh(self) -> str:
        """A character that the newest token made readable, though a later token may make it unreadable."""
        ...

    def push(self, token: int) -> str:
        """The text that this token settles: no later one changes it. It comes without what is `fresh`."""
        ...


class Match(NamedTuple):
    """A string that stands in the text; it begins `cut` characters before the end of what is readable."""

    string: str
    cut: int


class Search:
    """Finds `strings` with the first token whose text completes them. O(1) amortised for each token.

    What it reads equals, after each token, the decoding of all tokens so far, up to a character that is not
    finished. No match begins before the first token.
    """

    def __init__(self, strings: Sequence[str], reader: Reader) -> None:
        self._strings = strings
        self._reader = reader
        self._longest = max(map(len, strings))
        self._settled = ""  # the newest settled characters, one less than the longest string has
        self._fresh = ""  # the newest of those that are readable after them
        self._settled_end = 0  # where they end, from the first token on
        self._looked_at = 0  # where the text ended in which was looked last

    def push(self, token: int) -> list[Match]:
        """The strings that this token completes, in the order in which they begin."""
        return self.look(self._reader.push(token), self._reader.fresh)

    def look(self, settled: str, fresh: str) -> list[Match]:
        """The same for a token that its reader has read already."""
        if settled:
            text = self._settled + settled
            self._settled_end += len(settled)
            end = self._settled_end
            self._settled, self._fresh = text[max(0, len(text) - self._longest + 1) :], ""
        elif fresh:
            self._fresh = (self._fresh + fresh)[-self._longest :]
            text = (self._settled + self._fresh)[-self._longest :]
            end = max(self._looked_at, self._settled_end) + len(fresh)
        else:
            return []
        return self._matches(text, end)

    def _matches(self, text: str, end: int) -> list[Match]:
        """Those in `text`, which ends at `end`, that end after what was looked at before."""
        new = len(text) - (end - self._looked_at)
        self._looked_at = end
        found: list[tuple[int, Match]] = []
        for string in self._strings:
            at = text.find(string, max(0, new - len(string) + 1))
            if at >= 0:
                found.append((at, Match(string, len(text) - at)))
        return [match for _, match in sorted(found, key=lambda pair: pair[0])]
