"""Strings are found with the token that completes them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.search import Match, Search
from tests.scheduler.alphabet import Pieces

PIECES = ("", "a", "b", "ab", "ba", "aab", "c")
tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=25)
strings = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3, unique=True)


class Settling:
    """Settles nothing until a token of several characters comes: until then, each letter is fresh."""

    def __init__(self) -> None:
        self.fresh, self._waits = "", ""

    def push(self, token: int) -> str:
        piece, self.fresh = PIECES[token], ""
        if len(piece) == 1:
            self._waits, self.fresh = self._waits + piece, piece
            return ""
        settled, self._waits = (self._waits + piece, "") if piece else ("", self._waits)
        return settled


def search(strings: list[str]) -> Search:
    return Search(strings, Pieces(PIECES.__getitem__))


def completed(strings: list[str], text: str, before: int) -> set[str]:
    """The strings of which one ends beyond the first `before` characters."""
    return {
        string
        for string in strings
        for end in range(max(before, len(string) - 1) + 1, len(text) + 1)
        if text[:end].endswith(string)
    }


@settings(max_examples=50)
@given(tokens=tokens, strings=strings, settling=st.booleans())
def test_a_token_completes_what_ends_in_its_text_and_nothing_else(tokens, strings, settling):
    looking = Search(strings, Settling()) if settling else search(strings)
    text = ""
    for token in tokens:
        before, text = len(text), text + PIECES[token]
        found = looking.push(token)
        assert {match.string for match in found} == completed(strings, text, before)
        begins = [len(text) - match.cut for match in found]
        assert begins == sorted(begins)
        assert all(text[at:].startswith(match.string) for at, match in zip(begins, found, strict=True))


def test_the_string_that_begins_first_is_named_first_and_of_two_that_begin_together_the_first_given():
    assert search(["b", "aab", "aa"]).push(5) == [Match("aab", 3), Match("aa", 3), Match("b", 1)]
