"""What is announced is what expressions find in the whole text, at any time, in time linear in the text."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.announcement import Announcement
from scheduler.grammars import MULTIVERSE, NPR, TagGrammar
from scheduler.outline import Line, Outline
from tests.durations import is_linear
from tests.scheduler.outlines import pattern

MOST = 3
GRAMMARS = (
    MULTIVERSE,
    replace(MULTIVERSE, plan_open="aa", outline=Line("[", "]")),
    replace(MULTIVERSE, plan_open=" ", outline=Line(" ", "\x01")),
    replace(MULTIVERSE, plan_open="[]", outline=Line("[", " ]")),
)
PIECES = ("[", "]", " ", "a", "\x01", "<Goal>", "<Go", "al>", "<Outline>1:", "<Outline>", "2 :", "a]", " ]")
told = st.lists(
    st.tuples(st.sampled_from(PIECES), st.sampled_from(["settled", "fresh", "lost"])), max_size=30
)


def meant(grammar: TagGrammar, text: str) -> list[str]:
    _, opened, plan = text.rpartition(grammar.plan_open)
    labels = pattern(grammar.outline).findall(plan) if opened else []
    return labels if len(labels) <= MOST else []


@settings(max_examples=300)
@given(grammar=st.sampled_from(GRAMMARS), told=told, asked=st.integers(1, 4))
def test_the_labels_are_those_in_the_readable_text_since_a_plan_was_opened(grammar, told, asked):
    """Text that was readable may be settled as something else."""
    announced, settled, fresh = Announcement(grammar, MOST), "", ""
    for count, (piece, kind) in enumerate(told):
        if kind == "fresh":
            fresh += piece
            announced.read("", piece)
        else:
            now = (fresh if kind == "settled" else "�" * len(fresh)) + piece
            settled, fresh = settled + now, ""
            announced.read(now, "")
        if count % asked == 0:
            assert [*announced.labels()] == meant(grammar, settled + fresh)


def seconds(grammar: TagGrammar, unit: str, count: int, *, fresh: bool) -> float:
    """To read a plan of `count` units, each of which closes it."""
    announced = Announcement(grammar, MOST)
    announced.read(grammar.plan_open, "")
    began = time.process_time()
    for _ in range(count):
        announced.read("" if fresh else unit, unit if fresh else "")
        announced.labels()
    return time.process_time() - began


@pytest.mark.parametrize("fresh", [False, True], ids=["settled", "fresh"])
@pytest.mark.parametrize(
    ("outline", "unit"),
    [
        (Line(" ", "\x01"), " "),
        (Line(" ", " "), " "),
        (Line(" ", " " * 256), " "),
        (Line("a", "a" * 255 + "b"), "a"),
        (Line("a" * 256, "a" * 128 + "b" + "a" * 127), "a"),
        (Line("[", "]"), "[ ]"),
        (Line("[", "]"), "[\n]"),
        (Line("[", " ]"), "[a "),
        (MULTIVERSE.outline, "<Outline>1</Goal>"),
        (NPR.outline, "1</guideline>"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_reading_takes_time_linear_in_the_text(outline: Outline, unit: str, fresh: bool) -> None:
    grammar = replace(MULTIVERSE, plan_open="Q", outline=outline)
    assert is_linear(lambda count: seconds(grammar, unit, count, fresh=fresh), 2000)
