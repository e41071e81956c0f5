"""The tag sets of Multiverse, NPR and ThreadWeaver, each on a short text in its format.

A sample is what the model says on the trunk and in each branch; what stands between is the server's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest

from scheduler.cursor import Action, Cursor, Decode, End, Fork, cursor
from scheduler.grammars import GRAMMARS, MULTIVERSE, NPR, THREADWEAVER, TagGrammar
from scheduler.program import TagProgram
from scheduler.stopping import FinishReason, Stopping
from tests.scheduler.alphabet import Pieces


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids)

    def reader(self, before: Iterable[int], *, special_tokens: bool) -> Pieces:
        return Pieces(chr)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model says, before the fork and in each branch by label, and the whole text that results."""

    grammar: TagGrammar
    trunk: str
    branches: dict[str, str]
    text: str


SAMPLES = (
    Sample(
        MULTIVERSE,
        """Two things are asked.
<Parallel>
<Goal>
<Outline>1: The area of the square.</Outline>
<Outline> 2 : The area of the circle.</Outline>
</Goal>""",
        {"1": " Its side is 4, so it is 16.\n</Path>", "2": " Its radius is 1, so it is pi.\n</Path>"},
        """Two things are asked.
<Parallel>
<Goal>
<Outline>1: The area of the square.</Outline>
<Outline> 2 : The area of the circle.</Outline>
</Goal>
<Path>
1: Its side is 4, so it is 16.
</Path>
<Path>
2: Its radius is 1, so it is pi.
</Path>
<Conclusion>
""",
    ),
    Sample(
        NPR,
        """<guideline>
<plan>1: Try even numbers.</plan>
<plan>2: Try odd numbers.</plan>
</guideline>""",
        {"1": " 2 works, no other one is prime.\n</step>", "2": " 3, 5 and 7 work.\n</step>"},
        """<guideline>
<plan>1: Try even numbers.</plan>
<plan>2: Try odd numbers.</plan>
</guideline>
<step>
1: 2 works, no other one is prime.
</step>
<step>
2: 3, 5 and 7 work.
</step>
<takeaway>
""",
    ),
    Sample(
        THREADWEAVER,
        """<Parallel>
<Outlines>
<Outline> 1: Substitute.
<Outline> 2: Draw it.
</Outlines>""",
        {"1": " x = 3.\n</Thread>", "2": " The lines meet at 3.\n</Thread>"},
        """<Parallel>
<Outlines>
<Outline> 1: Substitute.
<Outline> 2: Draw it.
</Outlines>
<Thread>
1: x = 3.
</Thread>
<Thread>
2: The lines meet at 3.
</Thread>
""",
    ),
)
BY_NAME = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.grammar.name)


def started(grammar: TagGrammar) -> Cursor:
    stopping = Stopping(max_tokens=1000)
    where = cursor(TagProgram(grammar=grammar, stopping=stopping, branch_max_tokens=500), Characters())
    where.begin(0)
    return where


def say(where: Cursor, text: str) -> list[Action | None]:
    ids = Characters().encode(text)
    return [where.on_token(ids[: end + 1], 0, end + 1) for end in range(len(ids))]


def fork_of(sample: Sample) -> tuple[Cursor, Fork]:
    where = started(sample.grammar)
    *before, fork = say(where, sample.trunk)
    assert set(before) == {None}
    assert isinstance(fork, Fork)
    return where, fork


@BY_NAME
def test_a_sample_forks_at_the_end_of_its_plan_joins_and_reads_as_one_text(sample: Sample) -> None:
    where, fork = fork_of(sample)
    text = sample.trunk
    for child in fork.children:
        said = sample.branches[child.label]
        *before, end = say(child.cursor, said)
        assert set(before) == {None}
        assert end == End(FinishReason.BRANCH_CLOSED)
        text += Characters().decode(child.first.prefix) + said
    after = where.on_join(len(text))
    assert isinstance(after, Decode)
    assert text + Characters().decode(after.prefix) == sample.text
    assert {child.label for child in fork.children} == set(sample.branches)


@BY_NAME
def test_a_sample_means_nothing_in_another_grammar(sample: Sample) -> None:
    for other in GRAMMARS.values():
        if other is not sample.grammar:
            assert set(say(started(other), sample.text)) == {None}


def test_only_threadweaver_reads_its_branches_again() -> None:
    joins = {sample.grammar.name: fork_of(sample)[1].join for sample in SAMPLES}
    assert joins == {"multiverse": "kv", "npr": "kv", "threadweaver": "reprefill"}
    assert joins.keys() == GRAMMARS.keys()
