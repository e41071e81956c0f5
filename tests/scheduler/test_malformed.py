"""What becomes of a model-driven answer that is malformed: docs/model-driven-forks.md, case by case.

A scripted model says one text on the trunk and one in each branch. Every run is bounded in steps, checks
pages and slots in each of them, and ends with all of them free (see World); every answer is also what the
interpreter says, which knows no pages and no steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pytest

from scheduler.events import StageFinished, StageStarted, TokenEmitted
from scheduler.grammars import MULTIVERSE
from scheduler.program import TagProgram
from scheduler.request import Request
from scheduler.stopping import FinishReason, Stopping
from tests.scheduler.alphabet import EOS, Alphabet, tokens
from tests.scheduler.scripted import Scripted, numbers, outlines
from tests.scheduler.symbolic import Path
from tests.scheduler.world import Setting, World, assert_says, serve

BRANCH_CLOSED, CONTEXT, ENDED, FORKED, MAX_TOKENS, STOPPED = (
    FinishReason.BRANCH_CLOSED,
    FinishReason.CONTEXT,
    FinishReason.EOS,
    FinishReason.FORKED,
    FinishReason.MAX_TOKENS,
    FinishReason.STOP,
)
CODEC = Alphabet()
PROGRAM = TagProgram(
    grammar=MULTIVERSE,
    stopping=Stopping(max_tokens=60, eos_ids=frozenset({EOS})),
    branch_max_tokens=20,
    max_branches=3,
    max_depth=2,
)
PLAN = "<Goal><Outline>1:a<Outline>2:b</Goal>"
"""Two outlines, 1 and 2: the trunk's first text in most cases."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """By branch, () the trunk: all that the model said, and why each of its stages ended."""

    said: dict[tuple[str, ...], str]
    ends: dict[tuple[str, ...], list[FinishReason]]


def outcome(world: World) -> Outcome:
    names: dict[int, tuple[str, ...]] = {0: ()}
    found = Outcome({(): ""}, {(): []})
    for event in world.events["r"]:
        match event:
            case StageStarted(branches=infos):
                for info in infos:
                    if info.branch:
                        names[info.branch] = (*names[info.parent], info.label)
                    found.said.setdefault(names[info.branch], "")
                    found.ends.setdefault(names[info.branch], [])
            case TokenEmitted(branch=branch, sample=sample):
                found.said[names[branch]] += CODEC.decode([sample.token])
            case StageFinished(branch=branch, reason=reason):
                found.ends[names[branch]].append(reason)
            case _:
                pass
    return found


def answered(
    texts: Mapping[Path, Iterable[str]],
    program: TagProgram = PROGRAM,
    prompt: str = "a",
    **setting: object,
) -> Outcome:
    """Serves one request whose model says `texts`, under two policies; both must come to the same."""
    request = Request(id="r", prompt=tokens(prompt), program=program)
    outcomes: list[Outcome] = []
    for policy in ("eager", "off"):
        chosen = Setting(policy=policy, **setting)  # type: ignore[arg-type]
        world = serve([request], chosen, Scripted(texts))
        if "num_pages" not in setting:
            assert_says(world, [request], Scripted(texts))
        outcomes.append(outcome(world))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def path(*children: int) -> Path:
    """Of the n-th branch of the first fork, of whose first fork the m-th, and so on."""
    return tuple((0, child) for child in children)


def limited(**changes: object) -> TagProgram:
    return replace(PROGRAM, **changes)  # type: ignore[arg-type]


GOOD = {path(0): ["a</Path>"], path(1): ["ba</Path>"]}


# --- tags that never come ------------------------------------------------------------------------------


def test_a_plan_that_is_never_closed_is_text_up_to_max_tokens() -> None:
    found = answered({(): ["<Goal><Outline>1:a<Outline>2:b"]})
    assert found.ends == {(): [MAX_TOKENS]}
    assert found.said[()].startswith("<Goal><Outline>1:a<Outline>2:bddd")


def test_a_branch_that_is_never_closed_ends_at_its_limit_and_is_joined() -> None:
    found = answered({(): [PLAN, "cc$"], path(0): ["a"], path(1): ["ba</Path>"]})
    assert found.ends == {(): [FORKED, ENDED], ("1",): [MAX_TOKENS], ("2",): [BRANCH_CLOSED]}
    assert found.said[()] == PLAN + "cc"
    seed = tokens("\n<Path>\n1:")
    assert len(tokens(found.said["1",])) == PROGRAM.branch_max_tokens - len(seed)


def test_branches_that_are_never_closed_leave_room_for_nothing_else() -> None:
    found = answered({(): [PLAN]}, limited(branch_max_tokens=1000))
    assert found.ends == {(): [FORKED, MAX_TOKENS], ("1",): [MAX_TOKENS], ("2",): [MAX_TOKENS]}


def test_a_model_that_opens_forks_for_ever_is_stopped_by_max_tokens() -> None:
    found = answered({(): [PLAN] * 9, **GOOD, **{((n, m),): ["a</Path>"] for n in range(9) for m in (0, 1)}})
    assert found.ends[()][:2] == [FORKED, FORKED]
    assert found.ends[()][-1] is MAX_TOKENS


def test_a_plan_that_opens_nothing_does_not_keep_the_next_one_from_opening() -> None:
    found = answered({(): ["<Goal>a</Goal>" + PLAN, "$"], **GOOD})
    assert found.ends[()] == [FORKED, ENDED]
    assert found.ends["1",] == [BRANCH_CLOSED]


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_caller_that_hangs_up_in_the_middle_of_a_fork_leaves_nothing_behind(in_flight: int) -> None:
    world = World(Setting(policy="eager", in_flight=in_flight), Scripted({(): [PLAN]}))
    world.add(Request(id="r", prompt=tokens("a"), program=PROGRAM))
    while not any(entry.branch for step in world.steps for entry in step.entries):
        world.step()
        assert len(world.steps) < 50
    assert world.pool.owned > 0
    world.cancel("r")
    world.check_drained()
    world.run([])


# --- outlines ------------------------------------------------------------------------------------------


def test_an_outline_whose_path_is_empty_is_an_empty_branch() -> None:
    found = answered({(): [PLAN, "$"], path(0): ["</Path>"], path(1): ["$"]})
    assert found.ends == {(): [FORKED, ENDED], ("1",): [BRANCH_CLOSED], ("2",): [ENDED]}
    assert (found.said["1",], found.said["2",]) == ("</Path>", "")


def test_an_outline_that_has_no_number_gets_no_path() -> None:
    plan = "<Goal><Outline>1:a<Outline>b<Outline>:cc<Outline>3:d</Goal>"
    found = answered({(): [plan, "$"], **GOOD})
    assert found.ends == {(): [FORKED, ENDED], ("1",): [BRANCH_CLOSED], ("3",): [BRANCH_CLOSED]}


@pytest.mark.parametrize("plan", ["<Goal></Goal>", "<Goal>a</Goal>", "<Goal><Outline>a</Goal>"])
def test_a_plan_without_outlines_is_text(plan: str) -> None:
    assert answered({(): [plan + "a$"]}) == Outcome({(): plan + "a"}, {(): [ENDED]})


def test_outlines_with_the_same_number_are_two_branches() -> None:
    request = Request(id="r", prompt=tokens("a"), program=PROGRAM)
    texts = {(): ["<Goal><Outline>1:a<Outline>1:b</Goal>", "$"], **GOOD}
    world = serve([request], Setting(), Scripted(texts))
    (born,) = [event.branches for event in world.events["r"] if isinstance(event, StageStarted)][1:2]
    assert [(info.branch, info.label) for info in born] == [(1, "1"), (2, "1")]


def test_exactly_as_many_outlines_as_allowed_all_open() -> None:
    found = answered({(): [outlines(3), "$"], **{path(n): ["a</Path>"] for n in range(3)}})
    assert found.ends[()] == [FORKED, ENDED]
    assert [found.ends[label,] for label in numbers(3)] == [[BRANCH_CLOSED]] * 3


def test_one_outline_more_than_allowed_and_none_opens() -> None:
    found = answered({(): [outlines(4) + "a$"]})
    assert found == Outcome({(): outlines(4) + "a"}, {(): [ENDED]})


FIFTY = limited(stopping=Stopping(max_tokens=600, eos_ids=frozenset({EOS})), max_branches=3)
WIDE = replace(FIFTY, max_branches=50)


def test_fifty_outlines_where_three_are_allowed_are_text() -> None:
    found = answered({(): [outlines(50) + "$"]}, FIFTY, max_context=700)
    assert found.ends == {(): [ENDED]}


@pytest.mark.parametrize("buckets", [(4, 8), (4, 8, 16, 32, 64)], ids=["8 rows", "64 rows"])
def test_fifty_outlines_where_they_are_allowed_are_fifty_branches(buckets: tuple[int, ...]) -> None:
    texts = {(): [outlines(50), "$"], **{path(n): ["a" * (n % 7) + "</Path>"] for n in range(50)}}
    request = Request(id="r", prompt=tokens("a"), program=WIDE)
    world = serve([request], Setting(buckets=buckets, num_pages=1000, max_context=900), Scripted(texts))
    found = outcome(world)
    assert found.ends[()] == [FORKED, ENDED]
    assert [found.ends[label,] for label in numbers(50)] == [[BRANCH_CLOSED]] * 50
    assert max(step.rows for step in world.steps) <= max(buckets)


def test_fifty_outlines_that_the_pages_could_not_hold_are_text() -> None:
    found = answered({(): [outlines(50) + "$"]}, WIDE, num_pages=200, max_context=700)
    assert found.ends == {(): [ENDED]}


# --- nesting -------------------------------------------------------------------------------------------


def test_a_fork_nested_deeper_than_allowed_is_text_in_its_branch() -> None:
    texts = {
        (): [PLAN, "$"],
        path(0): [PLAN, "a</Path>"],
        path(1): ["ba</Path>"],
        path(0, 0): [PLAN + "a</Path>"],
        path(0, 1): ["ba</Path>"],
    }
    found = answered(texts, limited(branch_max_tokens=50))
    assert found.ends == {
        (): [FORKED, ENDED],
        ("1",): [FORKED, BRANCH_CLOSED],
        ("2",): [BRANCH_CLOSED],
        ("1", "1"): [BRANCH_CLOSED],
        ("1", "2"): [BRANCH_CLOSED],
    }
    assert found.said["1", "1"] == PLAN + "a</Path>"


# --- tags where they mean nothing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["a</Path>b", "a</Goal>b", "<Conclusion>", "<Outline>1:a</Goal>", "<Goal>a<Path>", "<Path>a</Path>"],
)
def test_tags_inside_ordinary_text_are_text(text: str) -> None:
    assert answered({(): [text + "$"]}) == Outcome({(): text}, {(): [ENDED]})


def test_a_branch_may_speak_of_other_tags() -> None:
    found = answered({(): [PLAN, "$"], path(0): ["a</Goal><Outline>b</Path>"], path(1): ["</Path>"]})
    assert found.said["1",] == "a</Goal><Outline>b</Path>"
    assert found.ends["1",] == [BRANCH_CLOSED]


def test_tags_of_the_prompt_open_nothing_and_close_nothing() -> None:
    found = answered({(): ["ab$"]}, prompt=PLAN + "</Path>")
    assert found == Outcome({(): "ab"}, {(): [ENDED]})


def test_a_plan_that_the_prompt_begins_is_not_the_models() -> None:
    found = answered({(): ["</Goal>a$"]}, prompt="<Goal><Outline>1:a<Outline>2:b")
    assert found == Outcome({(): "</Goal>a"}, {(): [ENDED]})


# --- ends in the middle of a fork ----------------------------------------------------------------------


@pytest.mark.parametrize("more", [9, 12, 20, 25])
def test_max_tokens_in_the_middle_of_a_fork_ends_its_branches_and_the_request(more: int) -> None:
    program = limited(stopping=Stopping(max_tokens=len(tokens(PLAN)) + more), branch_max_tokens=1000)
    found = answered({(): [PLAN], path(0): ["a" * 40], path(1): ["ba</Path>"]}, program)
    assert found.ends[()] == [FORKED, MAX_TOKENS]
    assert found.ends["1",] == [MAX_TOKENS]
    assert len(tokens(found.said["1",])) == more - len(tokens("\n<Path>\n1:"))


@pytest.mark.parametrize("more", [1, 5])
def test_max_tokens_right_after_the_plan_leaves_no_room_for_a_fork(more: int) -> None:
    program = limited(stopping=Stopping(max_tokens=len(tokens(PLAN)) + more))
    assert answered({(): [PLAN]}, program).ends == {(): [MAX_TOKENS]}


def test_the_context_in_the_middle_of_a_fork_ends_its_branches_and_the_request() -> None:
    found = answered({(): [PLAN], **GOOD, path(0): ["a"]}, max_context=len(tokens(PLAN)) + 15)
    assert found.ends == {(): [FORKED, CONTEXT], ("1",): [CONTEXT], ("2",): [BRANCH_CLOSED]}


def test_the_end_of_the_turn_inside_a_branch_ends_the_branch_and_not_the_request() -> None:
    found = answered({(): [PLAN, "ab$"], path(0): ["a$"], path(1): ["ba</Path>"]})
    assert found.ends == {(): [FORKED, ENDED], ("1",): [ENDED], ("2",): [BRANCH_CLOSED]}
    assert found.said == {(): PLAN + "ab", ("1",): "a", ("2",): "ba</Path>"}


def test_a_stop_string_inside_a_branch_ends_the_branch_and_not_the_request() -> None:
    program = limited(stopping=replace(PROGRAM.stopping, stop_strings=("cc",)))
    found = answered({(): [PLAN, "ab$"], path(0): ["acc"], path(1): ["ba</Path>"]}, program)
    assert found.ends == {(): [FORKED, ENDED], ("1",): [STOPPED], ("2",): [BRANCH_CLOSED]}


def test_a_stop_string_inside_a_plan_ends_the_request() -> None:
    program = limited(stopping=replace(PROGRAM.stopping, stop_strings=("<Outline>2",)))
    assert answered({(): [PLAN]}, program).ends == {(): [STOPPED]}
