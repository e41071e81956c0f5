"""Outlines are what their regular expressions say, found piece by piece."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.grammars import GRAMMARS
from scheduler.outline import Line, Numbered, Outline
from tests.scheduler.outlines import pattern

SOME = ("[", "]", " ", "  ", "\t", "\n", "a", "ab", " ]", "[]", " " * 7, "a" * 64, "b" * 127)
pieces = st.lists(st.sampled_from(SOME), max_size=25)
strings = st.lists(st.sampled_from("[] \ta\n"), min_size=1, max_size=3).map("".join)
lines = st.builds(Line, strings, strings) | st.just(Line("[", "]"))
numbered = st.sampled_from([grammar.outline for grammar in GRAMMARS.values()])
plans = st.lists(st.sampled_from(["<Outline>", "<plan>", "<", "1", "2.3", "٣", ".", ":", " \n"]), max_size=25)


def found_in(outline: Outline, pieces: list[str]) -> list[list[str]]:
    """The labels after each piece."""
    sure, rest, found = list[str](), "", list[list[str]]()
    for piece in pieces:
        rest += piece
        more = outline.find(rest)
        sure, rest = sure + more.sure, rest[more.scanned :]
        found.append(sure + more.unsure)
    return found


def meant_in(outline: Outline, pieces: list[str]) -> list[list[str]]:
    return [pattern(outline).findall("".join(pieces[: n + 1])) for n in range(len(pieces))]


@settings(max_examples=300)
@given(outline=lines, pieces=pieces)
@example(outline=Line("[", "]"), pieces=["[ ", "]", "a", "]", "[]]"])  # a label of one space, for a while
@example(outline=Line("[", "  "), pieces=["[a", "  ", " ", "[b  "])  # that closes later with every space
@example(outline=Line(" ", " "), pieces=[" "] * 25)
@example(outline=Line("[", "]"), pieces=["[", "a" * 64, "a" * 63, "a", " " * 8, "]"])
def test_a_line_is_what_its_expression_says_whatever_comes_next(outline: Line, pieces: list[str]) -> None:
    assert found_in(outline, pieces) == meant_in(outline, pieces)


@settings(max_examples=100)
@given(outline=numbered, pieces=plans)
def test_a_numbered_outline_is_what_its_expression_says(outline: Numbered, pieces: list[str]) -> None:
    assert found_in(outline, pieces) == meant_in(outline, pieces)
