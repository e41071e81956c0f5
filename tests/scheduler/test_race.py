"""A stage that joins the first k of its branches: who is stopped, when, and what is left of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given

from scheduler.branch import Branch
from scheduler.events import Event, Joined, StageFinished, StageStarted, TokenEmitted
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, Stage
from scheduler.request import Request
from scheduler.stopping import FinishReason, Stopping
from tests.scheduler.alphabet import LETTERS, PLAIN
from tests.scheduler.interpreter import Interpreter
from tests.scheduler.strategies import RELAXED, examples, loads, plans, serving
from tests.scheduler.symbolic import TALKS_ON, SymbolicModel
from tests.scheduler.world import Setting, World, assert_says, roomy, serve, without_losers

MODEL = SymbolicModel(PLAIN)
OUTRUN, LIMIT = FinishReason.OUTRUN, FinishReason.MAX_TOKENS
POLICIES = ("off", "cap:2", "eager", "taper")


def branch(tokens: int, *stages: Stage, prefix: tuple[int, ...] = LETTERS[:1]) -> BranchSpec:
    return BranchSpec(stopping=Stopping(max_tokens=tokens), prefix=prefix, stages=stages)


def race(first_k: int, *branches: BranchSpec | int, join: str = "reprefill") -> ParallelStage:
    """Branches with limits of their own, which they reach."""
    specs = tuple(spec if isinstance(spec, BranchSpec) else branch(spec) for spec in branches)
    return ParallelStage(branches=specs, join=join, first_k=first_k)


def serial(tokens: int, prefix: tuple[int, ...] = LETTERS[:2]) -> SerialStage:
    return SerialStage(stopping=Stopping(max_tokens=tokens), prefix=prefix)


def request(*stages: Stage) -> Request:
    return Request(id="r", prompt=LETTERS[:4], program=Plan(stages=stages), slo=RELAXED)


def run(*stages: Stage, **setting: object) -> World:
    """In one piece: what is said is what the oracle says."""
    setting = {"policy": "eager", "in_flight": 0} | setting
    wanted = request(*stages)
    world = serve([wanted], Setting(**setting), TALKS_ON)  # type: ignore[arg-type]
    assert_says(world, [wanted], TALKS_ON)
    return world


def ends(world: World) -> dict[int, tuple[FinishReason, int]]:
    """How each branch but the trunk ended, and after how many tokens: once."""
    finals = [e for e in world.events["r"] if isinstance(e, StageFinished) and e.final and e.branch]
    assert max(Counter(event.branch for event in finals).values()) == 1
    return {event.branch: (event.reason, event.completion_tokens) for event in finals}


def reasons(world: World) -> dict[int, FinishReason]:
    return {number: reason for number, (reason, _) in ends(world).items()}


def joined(world: World) -> list[tuple[int, ...]]:
    return [event.branches for event in world.events["r"] if isinstance(event, Joined)]


# --- who wins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", ["kv", "reprefill"])
def test_the_branches_with_the_fewest_tokens_are_joined_in_their_order(join: str) -> None:
    world = run(race(2, 9, 4, 7, 5, join=join), serial(3))
    assert joined(world) == [(2, 4)]
    assert ends(world) == {1: (OUTRUN, 6), 2: (LIMIT, 4), 3: (OUTRUN, 6), 4: (LIMIT, 5)}


def test_of_two_with_as_many_tokens_the_earlier_one_is_first() -> None:
    world = run(race(1, 6, 5, 5, join="none"))
    assert reasons(world) == {1: OUTRUN, 2: LIMIT, 3: OUTRUN}
    assert ends(world)[1] == (OUTRUN, 6), "until then it could end with five as well"


@pytest.mark.parametrize("first_k", [0, 3])
def test_all_are_joined_where_nobody_can_lose(first_k: int) -> None:
    world = run(race(first_k, 2, 9, 4), serial(1))
    assert joined(world) == [(1, 2, 3)]
    finals = [event for event in world.events["r"] if isinstance(event, StageFinished)]
    assert all(event.final for event in finals), "each ends once"


def test_the_best_of_n_is_what_one_race_without_a_join_says() -> None:
    world = run(race(1, 5, 3, 9, join="none"))
    usage = world.finished("r").usage
    assert usage.critical_path_tokens == 3
    assert usage.completion_tokens == world.emitted("r") == 4 + 3 + 3


def test_a_branch_that_forks_again_counts_as_long_as_its_longest_chain() -> None:
    """Two tokens and the longest of three: five, whatever the others add."""
    nested = branch(2, race(0, 3, 3, 3, join="none"))
    assert ends(run(race(1, nested, 6, join="none")))[1] == (FinishReason.FORKED, 2)
    assert ends(run(race(1, nested, 5, join="none")))[1] == (FinishReason.FORKED, 2), "the earlier of two"
    assert ends(run(race(1, nested, 4, join="none")))[1] == (OUTRUN, 2)


def test_of_a_race_in_a_branch_only_the_winners_count() -> None:
    """Its loser has said more than the branch beside it when it is stopped; that does not count."""
    nested = branch(2, race(1, 30, 9))
    world = run(race(1, nested, 12, join="none"))
    assert reasons(world) == {1: FinishReason.FORKED, 2: OUTRUN, 3: OUTRUN, 4: LIMIT}
    assert ends(world)[3] == (OUTRUN, 10)


def test_a_branch_is_not_out_for_what_a_loser_of_its_own_has_said() -> None:
    """The winner of the inner race has much to read; meanwhile its rival says more than the outer one."""
    nested = branch(2, race(1, 40, branch(3, prefix=LETTERS * 3)))
    world = run(race(1, nested, 12, join="none"), max_chunk=1, prompt_floor=1)
    assert reasons(world) == {1: FinishReason.FORKED, 2: OUTRUN, 3: OUTRUN, 4: LIMIT}
    assert ends(world)[3][1] > 12


def test_a_loser_takes_its_branches_with_it() -> None:
    inner = race(1, 30, 40, 50)
    deep = branch(1, race(0, 20, branch(2, inner)), serial(9))
    world = run(race(1, deep, 6, join="kv"), serial(2))
    assert joined(world) == [(2,)]
    assert reasons(world) == {2: LIMIT} | dict.fromkeys((1, 3, 4, 5, 6, 7), OUTRUN)


def test_a_branch_below_a_loser_ends_once_if_it_had_ended() -> None:
    deep = branch(1, race(0, 2, 40))
    world = run(race(1, deep, 6, join="none"))
    assert reasons(world) == {1: OUTRUN, 2: LIMIT, 3: LIMIT, 4: OUTRUN}


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("join", ["kv", "reprefill", "none"])
def test_branches_that_begin_with_the_forks_token_race_too(join: str, in_flight: int) -> None:
    """The token is lent to all of them, and goes to the winners, or back."""
    inner = race(1, branch(4, prefix=()), branch(2), join="reprefill")
    outer = race(2, branch(9, prefix=()), branch(3, inner, prefix=()), branch(1, inner), join=join)
    run(serial(3), outer, *([serial(4)] if join != "none" else []), in_flight=in_flight)


@pytest.mark.parametrize("join", ["kv", "reprefill", "none"])
def test_a_branch_without_room_ends_at_once_and_wins(join: str) -> None:
    """The others are out before they begin."""
    full = branch(5, prefix=LETTERS * 3)
    stages = (serial(1, ()), race(1, full, 5, full, join=join), *([serial(9)] if join != "none" else []))
    world = run(*stages, max_context=4 + 1 + len(full.prefix))
    assert ends(world) == {1: (FinishReason.CONTEXT, 0), 2: (OUTRUN, 0), 3: (OUTRUN, 0)}
    assert len(without_losers(world.answer("r"))) == 2


# --- what becomes of the others ------------------------------------------------------------------------


def race_of(world: World) -> list[Branch]:
    return [each for each in world.scheduler.live["r"].branches.values() if each.parent is not None]


def pages_of(branches: Sequence[Branch]) -> set[int]:
    return {page for each in branches for segment in each.trail for page in segment.pages}


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("join", ["kv", "reprefill"])
def test_a_loser_frees_its_pages_and_its_slot_in_the_step_in_which_it_is_out(
    join: str, in_flight: int
) -> None:
    wanted = request(race(1, 5, 30, branch(1, race(1, 40, 41, join="kv"), serial(3)), join=join), serial(3))
    world = World(Setting(policy="eager", in_flight=in_flight, page_size=1), TALKS_ON)
    world.add(wanted)
    stopped: list[int] = []
    while not world.is_finished("r"):
        held = {each.id: pages_of([each]) for each in race_of(world)}
        slots = {each.id for each in race_of(world) if each.slot is not None}
        told, free = len(world.events["r"]), world.scheduler.free_slots
        world.step()
        ended = [e for e in world.events["r"][told:] if isinstance(e, StageFinished)]
        out = [event.branch for event in ended if event.reason is OUTRUN]
        if out:
            assert all(held[each] and held[each] <= world.pool.free for each in out)
            assert world.scheduler.free_slots >= free + len(slots.intersection(out))
            assert {each.id for each in race_of(world)}.isdisjoint(out), "their width counts no more"
        stopped += out
    assert stopped == [2, 4, 5, 3], "what is below a branch before itself"
    world.check_drained()
    assert_says(world, [wanted], TALKS_ON)


def test_a_branch_that_had_ended_is_outrun_by_a_shorter_one_and_frees_its_pages() -> None:
    """The short one has much to read before its first token."""
    wanted = request(race(1, 6, branch(2, prefix=LETTERS * 3), join="kv"), serial(3))
    setting = Setting(policy="eager", in_flight=0, page_size=1, max_chunk=1, prompt_floor=1)
    world = World(setting, TALKS_ON)
    world.add(wanted)
    world.run_until(lambda: any(isinstance(event, StageFinished) for event in world.events["r"]))
    assert told_of_ends(world) == [(1, LIMIT, False)]
    long = world.scheduler.live["r"].branches[0].forked[0]
    held = pages_of([long])
    assert len(held) >= 6
    assert held.isdisjoint(world.pool.free), "it may be joined yet"
    world.run_until(lambda: len(told_of_ends(world)) > 1)
    assert told_of_ends(world)[1:] == [(2, LIMIT, False), (1, OUTRUN, True), (2, LIMIT, True)]
    assert held <= world.pool.free
    world.run([])
    assert_says(world, [wanted], TALKS_ON)


def told_of_ends(world: World) -> list[tuple[int, FinishReason, bool]]:
    return [(e.branch, e.reason, e.final) for e in world.events["r"] if isinstance(e, StageFinished)]


def test_a_sample_of_a_loser_that_comes_late_is_dropped() -> None:
    world = World(Setting(policy="eager", in_flight=1), TALKS_ON)
    world.add(request(race(1, 4, 20, join="kv"), serial(3)))
    world.run_until(lambda: any(isinstance(e, Joined) for e in world.events["r"]))
    assert any(entry.branch == 2 for flown in world.flying for entry in flown.step.entries)
    before = sum(isinstance(e, TokenEmitted) and e.branch == 2 for e in world.events["r"])
    world.run([])
    after = sum(isinstance(e, TokenEmitted) and e.branch == 2 for e in world.events["r"])
    assert before == after


def test_a_race_that_was_preempted_is_decided_as_it_would_have_been() -> None:
    stages = (race(2, 30, 12, 25, 14, join="kv"), serial(6))
    load = [
        Request(id=f"r{n}", prompt=LETTERS[n:], program=Plan(stages=stages), slo=RELAXED) for n in range(4)
    ]
    setting = Setting(policy="eager", num_pages=44, page_size=4, prefix_cache=False)
    world = serve(load, setting, TALKS_ON)
    assert_says(world, load, TALKS_ON)
    assert sum(world.finished(each.id).usage.preemptions for each in load) > 0
    assert world.tails_dropped > 0


# --- whatever the schedule -----------------------------------------------------------------------------


def final_ends(events: Sequence[Event]) -> tuple[set[int], Counter[int]]:
    """Branches that began, and how often each ended finally."""
    begun = {info.branch for e in events if isinstance(e, StageStarted) for info in e.branches}
    return begun | {0}, Counter(e.branch for e in events if isinstance(e, StageFinished) and e.final)


@examples(40)
@given(loads(plans, most=2), serving)
def test_which_branches_win_is_the_same_under_every_policy(load: list[Request], setting: Setting) -> None:
    said: list[object] = []
    for policy in POLICIES:
        changed = {name: getattr(setting, name) for name in Setting.__slots__} | {"policy": policy}
        world = serve(load, roomy(load, Setting(**changed)), MODEL)
        said.append([without_losers(world.answer(each.id)) for each in load])
        for each in load:
            begun, ends = final_ends(world.events[each.id])
            assert ends == dict.fromkeys(begun, 1)
    assert all(answer == said[0] for answer in said)


def test_random_plans_have_losers_of_every_kind() -> None:
    """So that the comparison means something: stopped midway, after their end, and with those below them."""
    kinds: Counter[str] = Counter()

    @examples(150)
    @given(loads(plans, most=1), serving)
    def count(load: list[Request], setting: Setting) -> None:
        world = serve(load, roomy(load, setting), MODEL)
        meant = Interpreter(load[0], MODEL, setting.max_context).run()
        for key, records in world.answer("r0").items():
            if records[-1][:2] == ("end", OUTRUN):
                whole = records[:-1] == meant[key]
                kinds["whole" if whole else "midway"] += 1
                kinds["nested"] += len(key) > 1
        kinds["joined"] += any(isinstance(e, Joined) for e in world.events["r0"])

    count()
    assert min(kinds[kind] for kind in ("whole", "midway", "nested", "joined")) >= 10, kinds
