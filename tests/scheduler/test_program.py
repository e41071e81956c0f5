from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.program import (
    BranchSpec,
    ParallelStage,
    Plan,
    SerialStage,
    TagProgram,
    check_program,
    longest_first_prefix,
)
from scheduler.stopping import Stopping

FOUR = Stopping(max_tokens=4)


def spec(**more: object) -> BranchSpec:
    return BranchSpec(**({"stopping": FOUR} | more))  # type: ignore[arg-type]


PROGRAM = TagProgram(
    grammar=MULTIVERSE,
    stopping=Stopping(max_tokens=100, stop_strings=("d",)),
    branch_max_tokens=20,
    max_branches=3,
    max_depth=2,
)
PARALLEL = ParallelStage(branches=(spec(),))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((ParallelStage(branches=()),), r"stages\[0\]: a parallel stage needs"),
        ((SerialStage(stopping=Stopping(max_tokens=0)),), "max_tokens must be at least 1"),
        ((replace(PARALLEL, join="zip"),), "join must be one of kv, reprefill, none, got 'zip'"),
        ((replace(PARALLEL, join="kv"), SerialStage(stopping=FOUR)), r"stages\[1\]: .* needs a prefix"),
        ((replace(PARALLEL, join="kv"), PARALLEL), r"stages\[1\]: .* needs a prefix"),
        ((replace(PARALLEL, join="none"), SerialStage(stopping=FOUR)), "nothing can follow"),
        (
            (SerialStage(stopping=FOUR), ParallelStage(branches=(spec(), spec()), first_k=3)),
            r"stages\[1\]: first_k can be 1 to 2, the number of branches, or 0 for all of them, got 3",
        ),
        ((replace(PARALLEL, first_k=-1),), "first_k can be 1 to 1, .* got -1"),
        (
            (ParallelStage(branches=(spec(), spec(stages=(ParallelStage(branches=()),)))),),
            r"plan.stages\[0\].branches\[1\].stages\[0\]: a parallel stage needs",
        ),
    ],
)
def test_a_plan_that_could_not_run_is_refused_by_name(stages: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_program(Plan(stages=stages))


def test_tags_that_join_by_kv_bring_a_token_to_go_on_from() -> None:
    check_program(PROGRAM)
    with pytest.raises(ValueError, match="join_open that has tokens"):
        check_program(PROGRAM, lambda text: ())
    reprefill = replace(PROGRAM, grammar=replace(MULTIVERSE, join="reprefill"))
    check_program(reprefill, lambda text: ())


def test_plans_that_can_run_are_not_refused() -> None:
    check_program(
        Plan(
            stages=(
                SerialStage(stopping=FOUR),
                replace(PARALLEL, join="kv"),
                SerialStage(stopping=FOUR, prefix=(1,)),
                PARALLEL,
                SerialStage(stopping=FOUR),
                replace(PARALLEL, first_k=1),
                replace(PARALLEL, join="none", branches=(spec(), spec()), first_k=2),
            )
        )
    )


def test_what_is_forced_before_the_first_token_is_known() -> None:
    branches = (spec(prefix=(1, 2, 3)), spec())
    assert longest_first_prefix(Plan(stages=(SerialStage(stopping=FOUR, prefix=(1, 2)),))) == 2
    assert longest_first_prefix(Plan(stages=(ParallelStage(branches=branches),))) == 3
    assert longest_first_prefix(PROGRAM) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stopping": Stopping(max_tokens=0)}, "at least 1"),
        ({"branch_max_tokens": 0}, "at least 1"),
        ({"grammar": replace(MULTIVERSE, join_open="")}, "needs a join_open"),
        ({"grammar": replace(MULTIVERSE, join="none")}, "must be kv or reprefill"),
    ],
)
def test_a_tag_program_that_could_not_run_is_refused(
    changes: dict[str, Stopping | int | TagGrammar], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_program(replace(PROGRAM, **changes))  # type: ignore[arg-type]
