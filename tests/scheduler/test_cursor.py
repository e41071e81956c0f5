from __future__ import annotations

import codecs
import time
from collections.abc import Iterable
from dataclasses import replace

import pytest

from scheduler.cursor import Cursor, Decode, End, Fork, cursor
from scheduler.grammars import MULTIVERSE
from scheduler.outline import Line
from scheduler.program import (
    BranchSpec,
    ParallelStage,
    Plan,
    SerialStage,
    TagProgram,
)
from scheduler.stopping import FinishReason, Stopping
from tests.durations import is_linear
from tests.scheduler.alphabet import PIECES, Alphabet, Pieces, tokens

FOUR = Stopping(max_tokens=4)
CODEC = Alphabet()


def spec(**more: object) -> BranchSpec:
    return BranchSpec(**({"stopping": FOUR} | more))  # type: ignore[arg-type]


# --- plans -----------------------------------------------------------------------------------------------


def test_a_plan_goes_through_its_stages_in_order() -> None:
    nested = ParallelStage(branches=(spec(),), join="none")
    plan = Plan(
        stages=(
            SerialStage(stopping=FOUR, prefix=(1,)),
            ParallelStage(branches=(spec(label="x", prefix=(2,)), spec(stages=(nested,))), join="kv"),
            SerialStage(stopping=FOUR, prefix=(3,)),
        )
    )
    where = cursor(plan, CODEC)
    assert where.begin(10) == Decode((1,), FOUR)
    assert where.on_token([1, 5], 1, 12) is None
    fork = where.on_stop(FinishReason.EOS)
    assert isinstance(fork, Fork)
    assert (fork.index, fork.join) == (1, "kv")
    assert [child.label for child in fork.children] == ["x", ""]
    assert [child.first for child in fork.children] == [Decode((2,), FOUR), Decode((), FOUR)]
    assert fork.children[0].cursor.on_stop(FinishReason.STOP) == End(FinishReason.STOP)
    inner = fork.children[1].cursor.on_stop(FinishReason.STOP)
    assert isinstance(inner, Fork)
    assert inner.index == 0
    assert where.on_join(20) == Decode((3,), FOUR)
    assert where.on_stop(FinishReason.MAX_TOKENS) == End(FinishReason.MAX_TOKENS)


def test_a_plan_that_ends_in_branches_says_so() -> None:
    where = cursor(Plan(stages=(ParallelStage(branches=(spec(),)),)), CODEC)
    assert isinstance(where.begin(1), Fork)
    assert where.on_join(5) == End(FinishReason.FORKED)


@pytest.mark.parametrize(("asked", "joined", "is_race"), [(0, 3, False), (2, 2, True), (3, 3, False)])
def test_a_fork_knows_how_many_of_its_branches_are_joined(asked: int, joined: int, is_race: bool) -> None:
    fork = cursor(Plan(stages=(ParallelStage(branches=(spec(),) * 3, first_k=asked),)), CODEC).begin(1)
    assert isinstance(fork, Fork)
    assert (fork.first_k, fork.is_race) == (joined, is_race)


# --- tags ------------------------------------------------------------------------------------------------


PROGRAM = TagProgram(
    grammar=MULTIVERSE,
    stopping=Stopping(max_tokens=100, stop_strings=("d",)),
    branch_max_tokens=20,
    max_branches=3,
    max_depth=2,
)
FORK = "a<Goal><Outline>1:a<Outline>2.1:b</Goal>"


def feed(where: Cursor, text: str, position: int = 10) -> list[object]:
    """What the cursor says to each token of `text`, generated from `position` on."""
    given = [*tokens(text)]
    return [where.on_token(given[: n + 1], 0, position + n + 1) for n in range(len(given))]


def started(program: TagProgram = PROGRAM) -> Cursor:
    where = cursor(program, CODEC)
    assert isinstance(where.begin(10), Decode)
    return where


def test_a_tag_program_decodes_up_to_its_limit() -> None:
    assert cursor(PROGRAM, CODEC).begin(10) == Decode((), PROGRAM.stopping)


def test_the_closing_tag_forks_into_the_outlines() -> None:
    *before, fork = feed(started(), FORK)
    assert before == [None] * len(before)
    assert isinstance(fork, Fork)
    assert (fork.index, fork.join, fork.is_race) == (0, "kv", False)
    assert [child.label for child in fork.children] == ["1", "2.1"]
    assert [CODEC.decode(child.first.prefix) for child in fork.children] == ["\n<Path>\n1:", "\n<Path>\n2.1:"]


def test_a_branch_may_use_what_is_left_for_it_and_no_more() -> None:
    fork = feed(started(), FORK)[-1]
    assert isinstance(fork, Fork)
    first = fork.children[0].first
    assert first.stopping.max_tokens == 20 - len(first.prefix)
    assert first.stopping.stop_strings == ("d",)
    short = replace(PROGRAM, stopping=Stopping(max_tokens=len(tokens(FORK)) + 10))
    fork = feed(started(short), FORK)[-1]
    assert isinstance(fork, Fork)
    assert fork.children[0].first.stopping.max_tokens == 10 - len(first.prefix)


def test_a_branch_ends_with_its_tag_and_the_trunk_does_not() -> None:
    fork = feed(started(), FORK)[-1]
    assert isinstance(fork, Fork)
    assert feed(fork.children[0].cursor, "ab</Path>")[-1] == End(FinishReason.BRANCH_CLOSED)
    assert feed(started(), "ab</Path>")[-1] is None


def test_a_branch_may_fork_again_up_to_the_depth() -> None:
    fork = feed(started(), FORK)[-1]
    assert isinstance(fork, Fork)
    nested = feed(fork.children[0].cursor, FORK)[-1]
    assert isinstance(nested, Fork)
    assert feed(nested.children[0].cursor, FORK)[-1] is None


def test_a_tag_may_come_in_pieces() -> None:
    assert isinstance(feed(started(), "<Goal><Outline>1:</Goal>".replace("</Goal>", ""))[-1], type(None))
    where, given = started(), [*tokens("<Goal><Outline>1:"), *tokens("</"), *tokens("Goal>")]
    assert isinstance(where.on_token(given, 0, 20), Fork)


def test_a_tag_of_wide_characters_is_seen_where_it_comes_a_byte_a_token() -> None:
    class Bytes:
        def encode(self, text: str) -> list[int]:
            return [*text.encode()]

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

        def reader(self, before: Iterable[int], *, special_tokens: bool) -> Pieces:
            decoder = codecs.getincrementaldecoder("utf-8")()
            return Pieces(lambda token: decoder.decode(bytes([token])))

    where = cursor(replace(PROGRAM, grammar=replace(MULTIVERSE, plan_close="\N{CHECK MARK}!")), Bytes())
    where.begin(10)
    given = "<Goal><Outline>1:\N{CHECK MARK}!".encode()
    *before, fork = [where.on_token([*given[: n + 1]], 0, 11 + n) for n in range(len(given))]
    assert before == [None] * len(before)
    assert isinstance(fork, Fork)


@pytest.mark.parametrize(
    "text",
    [
        "<Goal>a</Goal>",  # no outline
        "<Outline>1:</Goal>",  # never begun
        "<Goal><Outline>1:<Outline>2:<Outline>3:<Outline>1.1:</Goal>",  # too many
        "<Outline>1:<Goal>a</Goal>",  # before it began
    ],
)
def test_a_malformed_fork_is_no_fork_and_the_next_one_is(text: str) -> None:
    assert feed(started(), text)[-1] is None
    where = started()
    feed(where, text)
    fork = feed(where, text + FORK)[-1]
    assert isinstance(fork, Fork)
    assert [child.label for child in fork.children] == ["1", "2.1"]


def test_two_tags_close_together_are_two() -> None:
    assert isinstance(feed(started(), "<Goal></Goal><Goal><Outline>1:</Goal>")[-1], Fork)


def test_a_fork_without_room_for_its_branches_is_no_fork() -> None:
    short = replace(PROGRAM, stopping=Stopping(max_tokens=len(tokens(FORK)) + 4))
    assert feed(started(short), FORK)[-1] is None


def test_a_token_costs_no_more_to_look_at_the_more_have_come_before() -> None:
    class Counting(Alphabet):
        read = 0

        def reader(self, before: Iterable[int], *, special_tokens: bool) -> Pieces:
            def spell(token: int) -> str:
                self.read += 1
                return PIECES[token]

            return Pieces(spell)

    codec = Counting()
    where = cursor(PROGRAM, codec)
    where.begin(10)
    given = [*tokens("a" * 500)]
    for token in tokens("bcd"):
        given.append(token)
        where.on_token(given, 500, 10 + len(given))
    assert codec.read == 3


def test_a_fork_without_room_that_is_tried_again_costs_no_more_tokenizing() -> None:
    class Counting(Alphabet):
        encoded = 0

        def encode(self, text: str) -> list[int]:
            self.encoded += 1
            return super().encode(text)

    codec = Counting()
    where = cursor(PROGRAM, codec)
    where.begin(10)
    forks = feed(where, "<Goal><Outline>1:<Outline>2:" + 20 * "</Goal>")[-20:]
    assert all(isinstance(fork, Fork) for fork in forks), "the pages may forbid each of them"
    assert codec.encoded == 2


def test_a_client_that_closes_a_plan_with_every_token_costs_time_linear_in_its_tokens() -> None:
    """Labels open with a space and never close: a regular expression tries every length of each."""
    grammar = replace(MULTIVERSE, plan_open="a", outline=Line(" ", "\x01"), plan_close=" ", branch_close="c")

    class Spaces(Alphabet):
        def reader(self, before: Iterable[int], *, special_tokens: bool) -> Pieces:
            return Pieces(lambda token: "a" if token else " ")

    def seconds(count: int) -> float:
        where = cursor(replace(PROGRAM, grammar=grammar, stopping=Stopping(max_tokens=10**6)), Spaces())
        where.begin(0)
        given = [1]
        where.on_token(given, 0, 1)
        began = time.process_time()
        for position in range(2, count):
            given.append(0)
            assert where.on_token(given, 0, position) is None
        return time.process_time() - began

    assert is_linear(seconds, 2000)


def test_only_what_the_stage_generated_counts() -> None:
    given = [*tokens("<Goal><Outline>1:")]
    assert started().on_token([*given, *tokens("</Goal>")], len(given), 20) is None


def test_the_parent_goes_on_after_the_conclusion_is_opened() -> None:
    action = started().on_join(30)
    assert isinstance(action, Decode)
    assert CODEC.decode(action.prefix) == "\n<Conclusion>\n"
    assert action.stopping.max_tokens == 10 + 100 - 30 - len(action.prefix)
    assert started().on_join(108) == End(FinishReason.MAX_TOKENS)


def test_stops_end_a_model_driven_branch() -> None:
    assert started().on_stop(FinishReason.EOS) == End(FinishReason.EOS)
