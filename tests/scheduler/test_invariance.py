"""What a request says does not depend on how it is served.

Its tokens, their positions and sampling keys, its ends, forks and joins: under any policy, buckets, chunks,
batch mates, arrival, pages, cache, slots and pipelining they are what the program alone says.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.footprint import worst_case_pages
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage
from scheduler.request import Request
from scheduler.sampling import SamplingParams
from scheduler.stopping import FinishReason, Stopping
from tests.scheduler.alphabet import FOLLOWS, LETTERS, PLAIN, TALKATIVE
from tests.scheduler.interpreter import Answer
from tests.scheduler.strategies import RELAXED, examples, loads, plans, serving, tag_programs
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, assert_says, roomy, serve

MODEL = SymbolicModel(PLAIN)
FORKS = SymbolicModel(TALKATIVE, FOLLOWS)
crowds = st.just(RELAXED)


def tight(load: list[Request], setting: Setting, spare: int) -> Setting:
    """Hardly more pages than the largest request needs."""
    needed = max(worst_case_pages(r, setting.page_size, setting.max_context) for r in load)
    return replace(setting, num_pages=needed + spare)


STOPPED = (FinishReason.EOS, FinishReason.STOP)


def forced_repeats(answer: Answer) -> int:
    """Where a token that was fed already has to be fed again.

    A stage begins with nothing, after one that ended on a token which was dropped or fed already; or such a
    token was lent to branches that are not joined, and comes back when an outer join wants it.
    """
    repeats = 0
    for key, records in answer.items():
        for before, after in itertools.pairwise(records):
            stopped = before[:1] == ("end",) and before[1] in STOPPED
            lent = after[:2] == ("end", FinishReason.FORKED) and key != ()
            repeats += stopped and (lent or after == ("stage", ()))
    return repeats


@examples(100)
@given(loads(plans), serving)
def test_plans(load: list[Request], setting: Setting) -> None:
    """Nor is anything computed twice by forks and joins."""
    world = serve(load, roomy(load, setting), MODEL)
    assert_says(world, load, MODEL)
    repeats = sum(forced_repeats(world.answer(request.id)) for request in load)
    # The last token again, and the stop after it if a step in flight had fed it and it is sampled again.
    assert world.recomputed() <= (1 + setting.in_flight) * repeats


@examples(75)
@given(loads(tag_programs), serving)
def test_model_driven_forks(load: list[Request], setting: Setting) -> None:
    world = serve(load, setting, FORKS)
    assert_says(world, load, FORKS)
    assert world.recomputed() == 0


@examples(75)
@given(loads(plans, least=3, most=6, slos=crowds), serving, st.integers(0, 24))
def test_plans_that_preempt_each_other(load: list[Request], setting: Setting, spare: int) -> None:
    assert_says(serve(load, tight(load, setting, spare), MODEL), load, MODEL)


@examples(75)
@given(loads(tag_programs, least=3, most=6, slos=crowds), serving, st.integers(0, 24))
def test_model_driven_forks_that_preempt_each_other(
    load: list[Request], setting: Setting, spare: int
) -> None:
    """Which forks fit depends on the pool, but on nothing that happens in it."""
    setting = tight(load, setting, spare)
    world = serve(load, setting, FORKS)
    plain = Setting(
        policy="off",
        in_flight=0,
        prefix_cache=False,
        num_pages=setting.num_pages,
        page_size=setting.page_size,
    )
    for request in load:
        alone = serve([request], plain, FORKS)
        assert world.answer(request.id) == alone.answer(request.id)


@examples(60)
@given(loads(plans, most=3), serving, st.permutations(range(3)))
def test_the_context_may_end(load: list[Request], setting: Setting, order: list[int]) -> None:
    setting = replace(setting, max_context=39)
    load = [load[index] for index in order if index < len(load)]
    assert_says(serve(load, roomy(load, setting), MODEL), load, MODEL)


@pytest.mark.parametrize("join", ["kv", "reprefill"])
@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_token_may_be_lent_on_before_anything_follows_it(join: str, in_flight: int) -> None:
    """Both branches end at once, and their own branches begin with nothing too."""
    inner = ParallelStage(branches=(BranchSpec(stopping=Stopping(max_tokens=3)),) * 2, join="reprefill")
    first = Stopping(max_tokens=3, eos_ids=frozenset(range(100)))
    outer = ParallelStage(branches=(BranchSpec(stopping=first, stages=(inner,)),) * 2, join=join)
    plan = Plan(stages=(outer, SerialStage(stopping=Stopping(max_tokens=3), prefix=LETTERS[:1])))
    penalised = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0)
    load = [Request(id="r", prompt=LETTERS[:3], program=plan, sampling=penalised, slo=RELAXED)]
    assert_says(serve(load, Setting(in_flight=in_flight), MODEL), load, MODEL)


@pytest.mark.parametrize("join", ["kv", "reprefill"])
@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_token_comes_back_from_branches_that_are_not_joined(join: str, in_flight: int) -> None:
    """The join further up reads it, as the last one that its branch has said."""
    inner = ParallelStage(branches=(BranchSpec(stopping=Stopping(max_tokens=3)),) * 2, join="none")
    outer = ParallelStage(
        branches=(BranchSpec(stopping=Stopping(max_tokens=4), prefix=LETTERS[:1], stages=(inner,)),) * 2,
        join=join,
    )
    plan = Plan(stages=(outer, SerialStage(stopping=Stopping(max_tokens=3), prefix=LETTERS[:1])))
    load = [Request(id="r", prompt=LETTERS[:3], program=plan, slo=RELAXED)]
    assert_says(serve(load, Setting(in_flight=in_flight), MODEL), load, MODEL)


# --- nothing is computed twice -------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("policy", ["off", "eager", "taper"])
def test_every_token_of_a_kv_join_is_computed_once(policy: str, in_flight: int) -> None:
    """All that is in the context: the prompt, what is forced, what is said; but for the very last token."""
    branches = tuple(
        BranchSpec(stopping=Stopping(max_tokens=3 + number), prefix=LETTERS[: 1 + number])
        for number in range(4)
    )
    plan = Plan(
        stages=(
            SerialStage(stopping=Stopping(max_tokens=5)),
            ParallelStage(branches=branches, join="kv"),
            SerialStage(stopping=Stopping(max_tokens=6), prefix=LETTERS[:2]),
        )
    )
    request = Request(id="r", prompt=LETTERS, program=plan)
    world = serve([request], Setting(policy=policy, in_flight=in_flight), SymbolicModel(LETTERS))
    forced = len(LETTERS) + (1 + 2 + 3 + 4) + 2
    assert sum(world.computed.values()) == forced + world.finished("r").usage.completion_tokens - 1


# --- the comparison means something --------------------------------------------------------------------


def test_a_crowd_preempts() -> None:
    """The loads above are of the kind that needs preemption, of tails and of whole requests."""
    branches = tuple(BranchSpec(stopping=Stopping(max_tokens=20), prefix=LETTERS[:1]) for _ in range(3))
    plan = Plan(
        stages=(
            ParallelStage(branches=branches, join="kv"),
            SerialStage(stopping=Stopping(max_tokens=8), prefix=LETTERS[:2]),
        )
    )
    load = [Request(id=f"r{n}", prompt=LETTERS[n:], program=plan, slo=RELAXED) for n in range(5)]
    world = serve(load, tight(load, Setting(policy="eager", prefix_cache=False), 12), MODEL)
    assert_says(world, load, MODEL)
    assert sum(world.finished(request.id).usage.preemptions for request in load) >= 3
    assert world.finished("r0").usage.preemptions == 0
    assert world.tails_dropped > 0


def test_other_tokens_follow_from_another_context() -> None:
    plan = Plan(stages=(SerialStage(stopping=Stopping(max_tokens=20)),))
    load = [Request(id=f"r{n}", prompt=(*LETTERS[:2], LETTERS[n]), program=plan) for n in range(3)]
    world = serve(load, Setting(), SymbolicModel(LETTERS))
    said = {tuple(world.answer(request.id)[()]) for request in load}
    assert len(said) == 3
