"""What may be the beginning of a string is found as one would by trying every length, in linear time."""

from __future__ import annotations

import time
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.beginnings import Beginnings
from tests.durations import takes_less

strings = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5)
pieces = st.lists(st.text("abc", max_size=4), max_size=20)


def by_trying(strings: list[str], before: str, piece: str) -> int:
    """How much must be held of `before` and `piece`."""
    text, held = before + piece, 0
    for string in strings:
        new = text.find(string, max(0, len(before) - len(string) + 1))
        sizes = [size for size in range(1, len(string)) if text.endswith(string[:size])]
        held = max(held, *sizes, len(text) - new if new >= 0 else 0, 0)
    return held


@settings(max_examples=300)
@given(strings=strings, pieces=pieces)
def test_it_is_the_longest_at_the_end_or_the_first_whole_one(strings: list[str], pieces: list[str]) -> None:
    beginnings, before = Beginnings(strings), ""
    state = beginnings.nothing
    for piece in pieces:
        state, held = beginnings.read(state, piece)
        assert held == by_trying(strings, before, piece)
        before += piece


def seconds(strings: list[str], piece: str, count: int = 20_000) -> float:
    """To read so many characters."""
    beginnings, began = Beginnings(strings), time.process_time()
    state = beginnings.nothing
    for each in repeat(piece, count // len(piece)):
        state, _ = beginnings.read(state, each)
    return time.process_time() - began


@pytest.mark.parametrize(
    ("strings", "piece"),
    [
        (["a" * 255 + "b"], "a"),
        (["a" * 255 + "b"], "a" * 255 + "c"),
        (["ab" * 127 + "c"], "ab"),
        (["a" * 256], "a"),
        (["a" * 255 + "b", *("a" + "c" * 254 + chr(100 + n) for n in range(15))], "a"),
        (["a" * n + "b" for n in range(1, 256)], "a" * 128),
    ],
)
def test_a_character_costs_no_more_the_longer_the_strings_and_the_more_there_are(
    strings: list[str], piece: str
) -> None:
    assert takes_less(lambda: seconds(strings, piece), 4, lambda: seconds(["ab"], piece))
