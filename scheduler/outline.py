"""How a model announces a branch: an outline, which opens, holds the branch's label, and closes.

A text is looked at piece by piece, and each of its characters a bounded number of times, whatever the outline
is: what more text cannot change is not looked at again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_SPACES = " \t"
_MOST_SPACES = 8  # beside the label of a `Line`
_MOST_LABEL = 128  # characters of it


class Found(NamedTuple):
    """The outlines in a text, in order, as their labels.

    sure     those that stay, whatever text follows
    unsure   those after them that more text may change
    scanned  characters from the beginning of the text that need not be looked at again with more text
    """

    sure: list[str]
    unsure: list[str]
    scanned: int


class Outline(Protocol):
    """Outlines do not overlap: the leftmost counts, and the next is looked for after its end."""

    def find(self, text: str) -> Found: ...


@dataclass(frozen=True, slots=True)
class Numbered:
    """A number between `opens` and `closes`, with any white space around it.

    `number` is a regular expression of digits and dots, which `opens` and `closes` do not begin with.
    """

    opens: str
    closes: str
    number: str = r"\d+"

    def find(self, text: str) -> Found:
        opens = re.escape(self.opens)
        labels, end = list[str](), 0
        for match in re.finditer(rf"{opens}\s*({self.number})\s*{re.escape(self.closes)}", text):
            labels.append(match[1])
            end = match.end()
        begun = re.compile(rf"{opens}[\s\d.]*+\Z").search(text, end)  # and it may go on
        return Found(labels, [], begun.start() if begun else max(end, len(text) - len(self.opens) + 1))


class _Match(NamedTuple):
    """What stands after an `opens`: a label, or none, and the end of the outline. `sure`: it stays so."""

    label: str
    end: int
    sure: bool


@dataclass(frozen=True, slots=True)
class Line:
    """Up to 128 characters of one line between any two strings, as few as can be; up to 8 spaces or tabs on
    each side are not the label's.

    As the regular expression `opens[ \\t]{0,8}([^\\n]{1,128}?)[ \\t]{0,8}closes`, which takes some thousand
    steps a character where a client chooses its two strings well.
    """

    opens: str
    closes: str

    def find(self, text: str) -> Found:
        sure, unsure = list[str](), list[str]()
        window = len(self.opens) + 2 * _MOST_SPACES + _MOST_LABEL + len(self.closes)
        at, scanned, close = 0, None, -1
        while True:
            if close <= at + len(self.opens):  # the first that an outline from here on can have
                close = text.find(self.closes, at + len(self.opens) + 1)
            if close < 0:
                at = max(at, len(text) - window + 1)
                break
            start = text.find(self.opens, max(at, close + len(self.closes) - window))
            if start < 0:
                at = max(at, len(text) - len(self.opens) + 1)
                break
            match = self._match(text, start + len(self.opens))
            if scanned is None and not match.sure:
                scanned = start
            if match.label:
                (sure if scanned is None else unsure).append(match.label)
            at = match.end if match.label else start + 1
        return Found(sure, unsure, at if scanned is None else scanned)

    def _match(self, text: str, begin: int) -> _Match:
        """What stands at `begin`, after an `opens`."""
        size = len(self.closes)
        lead = begin + _spaces(text, begin)
        after = lead + _MOST_LABEL + _MOST_SPACES  # the last place where it can close
        sure = len(text) >= after + size
        close = text.find(self.closes, lead + 1, after + size)
        if close >= 0:
            sure = True
            end = max(lead + 1, close - _spaces_before(text, close))
            if end - lead <= _MOST_LABEL and text.find("\n", lead, end) < 0:
                return self._closed(text, lead, end)
        for label in range(lead - 1, begin - 1, -1):  # the label is one of the spaces
            if text.startswith(self.closes, label + 1):
                match = self._closed(text, label, label + 1)
                return match._replace(sure=match.sure and sure)
        return _Match("", begin, sure)

    def _closed(self, text: str, label: int, end: int) -> _Match:
        """The label goes to `end`; `closes` stands after as many spaces as can be."""
        size = len(self.closes)
        spaces = _spaces(text, end)
        while not text.startswith(self.closes, end + spaces):
            spaces -= 1
        sure = self.closes[0] not in _SPACES or len(text) >= end + _MOST_SPACES + size
        return _Match(text[label:end], end + spaces + size, sure)


def _spaces(text: str, at: int) -> int:
    """How many there are from `at` on, up to 8."""
    some = text[at : at + _MOST_SPACES]
    return len(some) - len(some.lstrip(_SPACES))


def _spaces_before(text: str, at: int) -> int:
    some = text[max(0, at - _MOST_SPACES) : at]
    return len(some) - len(some.rstrip(_SPACES))
