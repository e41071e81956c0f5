from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.footprint import worst_case_pages
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, Stage, TagProgram
from scheduler.request import Request
from scheduler.stopping import Stopping
from tests.scheduler.alphabet import FOLLOWS, PLAIN, TALKATIVE
from tests.scheduler.strategies import GRAMMARS, examples, loads, plans, serving, tag_programs
from tests.scheduler.symbolic import TALKS_ON, SymbolicModel
from tests.scheduler.world import Setting, World


def stopping(tokens: int) -> Stopping:
    return Stopping(max_tokens=tokens)


def pages(*stages: Stage, prompt: int = 5, max_context: int = 1000) -> int:
    return worst_case_pages(
        Request(id="r", prompt=(1,) * prompt, program=Plan(stages=stages)), 4, max_context
    )


def branches(join: str, *lengths: int, prefix: tuple[int, ...] = (1,)) -> ParallelStage:
    specs = tuple(BranchSpec(stopping=stopping(length), prefix=prefix) for length in lengths)
    return ParallelStage(branches=specs, join=join)


def test_a_serial_request_needs_its_prompt_and_what_it_may_say() -> None:
    assert pages(SerialStage(stopping=stopping(3))) == 2
    assert pages(SerialStage(stopping=stopping(4))) == 3
    assert pages(SerialStage(stopping=stopping(3), prefix=(1, 1)), SerialStage(stopping=stopping(3))) == 4


def test_branches_begin_on_pages_of_their_own() -> None:
    assert pages(branches("none", 3, 3)) == 2 + 1 + 1
    assert pages(branches("none", 4, 3)) == 2 + 2 + 1


def test_branches_that_begin_with_nothing_repeat_the_forks_token() -> None:
    assert pages(branches("none", 3, 4, prefix=())) == 2 + 1 + 2


def test_one_branch_that_begins_with_nothing_makes_all_of_them_repeat_it() -> None:
    specs = tuple(BranchSpec(stopping=stopping(1), prefix=prefix) for prefix in ((), (1, 1, 1)))
    assert pages(ParallelStage(branches=specs, join="none")) == 2 + 1 + 2  # 1 + 1, and 1 + 3 + 1 tokens


def test_the_widest_moment_counts_though_it_is_not_the_last() -> None:
    wide = replace(branches("kv", 30, 30), first_k=1)
    between = SerialStage(stopping=stopping(1), prefix=(1,))
    assert pages(wide, between, branches("none", 3, 3)) == 2 + 8 + 8


def test_what_nobody_joins_is_given_back() -> None:
    spec = BranchSpec(stopping=stopping(3), prefix=(1,), stages=(branches("none", 30, 30),))
    joined = ParallelStage(branches=(spec,), join="kv")
    assert pages(joined, SerialStage(stopping=stopping(79), prefix=(1,))) == 2 + 1 + 20


def test_a_stage_may_end_early_and_leave_the_context_to_what_follows() -> None:
    before = SerialStage(stopping=stopping(40), prefix=(1,))
    assert pages(before, branches("none", 40), max_context=60) == 12 + 11  # positions 6 to 46


def test_a_kv_join_keeps_all_branches() -> None:
    after = SerialStage(stopping=stopping(5), prefix=(1,))
    assert pages(branches("kv", 3, 3), after) == 2 + 1 + 1 + 2


def test_a_reprefill_gives_the_branches_back_first() -> None:
    after = SerialStage(stopping=stopping(5), prefix=(1,))
    assert pages(branches("reprefill", 3, 3), after) == 2 + 4  # 4 + 4 tokens again, and 6 more
    assert pages(branches("reprefill", 30, 30), replace(after, stopping=stopping(1))) == 2 + 16


def test_of_a_race_all_run_and_any_may_be_joined() -> None:
    short = SerialStage(stopping=stopping(1), prefix=(1,))
    race = replace(branches("kv", 3, 7, 11), first_k=2)
    assert pages(race) == 2 + 1 + 2 + 3
    assert pages(race, replace(short, stopping=stopping(19))) == 2 + (2 + 3) + 5  # the largest are kept
    read_again = replace(race, join="reprefill")
    assert pages(read_again, replace(short, stopping=stopping(7))) == 2 + 7  # 8 + 12 tokens again, and 8


def test_after_a_race_the_context_has_room_for_what_the_shortest_winners_leave() -> None:
    specs = tuple(BranchSpec(stopping=stopping(3), prefix=(1,) * length) for length in (1, 41, 5))
    joined = ParallelStage(branches=specs, join="kv", first_k=2)
    after = SerialStage(stopping=stopping(100), prefix=(1,))
    assert pages(joined, after, max_context=60) == 2 + (11 + 2) + 13  # positions 10 to 59


def test_nothing_is_longer_than_the_context() -> None:
    assert pages(SerialStage(stopping=stopping(10_000)), max_context=32) == 8
    assert pages(branches("none", 10_000, 10_000), max_context=32) == 2 + 7 + 7
    assert pages(branches("none", 10_000, prefix=()), max_context=33) == 2 + 8, "from the fork's token on"


def test_a_model_driven_request_counts_as_serial() -> None:
    program = TagProgram(grammar=GRAMMARS[0], stopping=stopping(10), branch_max_tokens=50)
    assert worst_case_pages(Request(id="r", prompt=(1,) * 5, program=program), 4, 1000) == 4


MODEL = SymbolicModel(PLAIN)
FORKS = SymbolicModel(TALKATIVE, FOLLOWS)


@examples(60)
@given(loads(plans, most=1), serving, st.sampled_from([TALKS_ON, MODEL]), st.sampled_from([40, 200]))
def test_alone_a_plan_never_needs_more(
    load: list[Request], setting: Setting, model: SymbolicModel, max_context: int
) -> None:
    """With just as many pages as its worst case, a request runs to its end and is never preempted."""
    needed = worst_case_pages(load[0], setting.page_size, max_context)
    world = World(replace(setting, num_pages=needed, max_context=max_context), model)
    world.run(load)
    assert world.finished("r0").usage.preemptions == 0


@examples(60)
@given(loads(tag_programs, most=1), serving, st.integers(0, 40))
def test_alone_a_model_driven_request_never_needs_more_whatever_it_forks(
    load: list[Request], setting: Setting, extra: int
) -> None:
    needed = worst_case_pages(load[0], setting.page_size, setting.max_context) + extra
    world = World(replace(setting, num_pages=needed), FORKS)
    world.run(load)
    assert world.finished("r0").usage.preemptions == 0


def test_after_a_kv_join_the_context_has_room_for_what_the_longest_branch_leaves() -> None:
    specs = tuple(BranchSpec(stopping=stopping(3), prefix=(1,) * length) for length in (1, 41))
    after = SerialStage(stopping=stopping(100), prefix=(1,))
    joined = ParallelStage(branches=specs, join="kv")
    assert pages(joined, after, max_context=60) == 2 + 1 + 11 + 4  # positions 46 to 59
