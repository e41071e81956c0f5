"""The scheduler's rules: which requests can run, who has which slot, what is read again, who is gone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from scheduler.events import (
    Event,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    TokenEmitted,
    WidthChanged,
)
from scheduler.gate import RejectedError
from scheduler.grammars import MULTIVERSE
from scheduler.pages import PrefixCache
from scheduler.program import Plan, TagProgram
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step import StepResult
from tests.scheduler.alphabet import LETTERS, PLAIN, Alphabet, tokens
from tests.scheduler.interpreter import Interpreter
from tests.scheduler.requests import fork, request, serial, stopping
from tests.scheduler.strategies import RELAXED
from tests.scheduler.symbolic import TALKS_ON, SymbolicModel
from tests.scheduler.world import Setting, World, assert_says, serve

MODEL = SymbolicModel(PLAIN)


# --- which requests can run ----------------------------------------------------------------------------


def test_an_id_cannot_be_used_twice_at_a_time() -> None:
    world = World(Setting(), TALKS_ON)
    world.add(request("r", serial(3)))
    for _ in range(2):
        with pytest.raises(RejectedError, match="already running") as caught:
            world.add(request("r", serial(3)))
        assert caught.value.reason == "DUPLICATE"
        world.step()
    world.run([])
    world.run([request("r", serial(3))])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (request("r", serial(3), prompt=0), "prompt is empty"),
        (request("r", serial(3), prompt=20), "20 tokens before .* leave no room in 20"),
        (request("r", serial(3, prefix=LETTERS[:4]), prompt=16), "leave no room"),
        (request("r", fork(2), prompt=19), "leave no room"),
        (request("r"), "at least one stage"),
    ],
)
def test_a_request_that_cannot_run_is_an_error(wanted: Request, message: str) -> None:
    world = World(Setting(max_context=20), TALKS_ON)
    with pytest.raises(ValueError, match=message):
        world.add(wanted)
    assert world.scheduler.idle


def test_too_few_slots_are_refused() -> None:
    world = World(Setting(), TALKS_ON)
    with pytest.raises(ValueError, match="fewer than twice the largest bucket"):
        Scheduler(replace(world.scheduler.config, num_slots=63), world.scheduler.controller, Alphabet())


# --- slots ---------------------------------------------------------------------------------------------


def test_more_branches_than_slots_take_turns_with_them() -> None:
    load = [request("r", fork(12, join="kv"), serial(2, LETTERS[:1])), request("s", fork(9))]
    world = serve(load, Setting(buckets=(2,), in_flight=1), MODEL)
    assert_says(world, load, MODEL)
    assert len({setup.slot for step in world.steps for setup in step.slots}) <= 4


def test_a_younger_request_takes_its_slots_from_itself() -> None:
    """Four slots for six branches that take turns: those of the older one keep theirs."""
    load = [request(name, fork(3, tokens=20), prompt=3) for name in ("old", "young")]
    world = serve(load, Setting(buckets=(2,), in_flight=0, policy="off"), TALKS_ON)
    given = [
        entry.request_id
        for step in world.steps
        for entry in step.entries
        if entry.slot in {setup.slot for setup in step.slots}
    ]
    assert given.count("old") == 3


# --- the prefix cache ----------------------------------------------------------------------------------


def test_a_prompt_that_is_known_is_not_read_again() -> None:
    setting = Setting(page_size=4)
    world = World(setting, TALKS_ON)
    world.run([request("a", serial(1), prompt=18)])
    for name, prompt, cached in (("b", 18, 16), ("c", 17, 16), ("d", 16, 12), ("e", 40, 16)):
        world.run([request(name, serial(1), prompt=prompt)])
        assert world.finished(name).usage.cached_tokens == cached
    world.run([request("f", serial(1), prompt=18, cache_salt="other")])
    assert world.finished("f").usage.cached_tokens == 0


def test_what_was_generated_is_known_too_until_the_first_fork() -> None:
    world = World(Setting(page_size=4), TALKS_ON)
    world.run([request("a", serial(9), fork(2), prompt=4)])
    oracle = Interpreter(request("a", serial(9), prompt=4), TALKS_ON, 200)
    said = tuple(record[1] for record in oracle.run()[()] if record[0] == "token")
    again = Request(id="b", prompt=(*LETTERS[:4], *said), program=Plan(stages=(serial(1),)), slo=RELAXED)
    world.run([again])
    assert world.finished("b").usage.cached_tokens == 12


def test_nothing_is_kept_where_it_is_switched_off() -> None:
    world = World(Setting(prefix_cache=False), TALKS_ON)
    world.run([request("a", serial(1), prompt=18), request("b", serial(1), prompt=18)])
    assert world.pool.cache.idle == 0


def test_a_preempted_request_finds_its_own_prompt_again() -> None:
    load = [request(name, serial(40), prompt=12, cache_salt=name) for name in "ab"]
    setting = Setting(num_pages=20, page_size=4)
    world, cold = (serve(load, replace(setting, prefix_cache=on), MODEL) for on in (True, False))
    for served in (world, cold):
        assert_says(served, load, MODEL)
        assert served.finished("b").usage.preemptions == 1
    assert 0 < world.recomputed() < cold.recomputed()


# --- going away ----------------------------------------------------------------------------------------

NESTED = (
    serial(5),
    fork(3, tokens=8, join="kv", stages=(fork(2, tokens=4, join="reprefill"), serial(3))),
    serial(9, LETTERS[:2]),
)


def in_fork(world: World) -> bool:
    return any(branch.open_children for branch in world.scheduler.live["r"].branches.values())


def read_of_prompt(world: World) -> int:
    root = world.scheduler.live["r"].segments.get(0)
    return 0 if root is None else root.computed


def segments_before_trunk(world: World) -> int:
    trunk = world.scheduler.live["r"].branches.get(0)
    return 0 if trunk is None else len(trunk.segment.ancestors)


PHASES: dict[str, Callable[[World], bool]] = {
    "queued": lambda world: True,
    "mid-prompt": lambda world: 0 < read_of_prompt(world) < 30,
    "serial decode": lambda world: world.emitted("r") in (2, 3),
    "inside a fork": lambda world: in_fork(world) and world.emitted("r") > 9,
    "inside a nested fork": lambda world: len(world.scheduler.live["r"].branches) > 4,
    "between fork and join": lambda world: in_fork(world) and world.scheduler.live["r"].width == 1,
    "after the join": lambda world: segments_before_trunk(world) > 3,
    "preempted": lambda world: bool(world.scheduler.preempted),
}


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_a_cancelled_request_is_gone_at_once_and_nobody_else_notices(phase: str, in_flight: int) -> None:
    others = [request("x", fork(3, tokens=30)), request("y", serial(40))]
    pages = 40 if phase == "preempted" else 250
    world = World(Setting(in_flight=in_flight, max_chunk=4, num_pages=pages, prefix_cache=False), MODEL)
    for other in others:
        world.add(other)
    world.run_until(lambda: world.emitted("y") > 2)
    world.add(request("r", *NESTED, prompt=30))
    world.run_until(lambda: PHASES[phase](world))
    pages_of = [page for s in world.scheduler.live["r"].segments.values() for page in s.pages]
    assert world.cancel("r")
    assert not world.cancel("r")
    owned = {
        page
        for live in world.scheduler.live.values()
        for segment in live.segments.values()
        for page in segment.pages
    }
    slots = sum(b.slot is not None for live in world.scheduler.live.values() for b in live.branches.values())
    assert world.pool.owned == len(owned)
    assert owned.isdisjoint(pages_of)
    assert world.scheduler.free_slots == world.scheduler.config.num_slots - slots
    before = len(world.events["r"])
    world.run([])
    assert len(world.events["r"]) == before, "nothing more is heard of it"
    assert_says(world, others, MODEL)


def test_an_id_may_come_back_while_a_step_of_its_former_self_is_in_flight() -> None:
    world = World(Setting(policy="eager"), MODEL)
    world.add(request("r", fork(4, tokens=9)))
    world.run_until(lambda: world.emitted("r") > 3)
    world.launch()
    world.cancel("r")
    world.events.clear()
    again = request("r", serial(5), prompt=9)
    world.add(again)
    world.run([])
    assert_says(world, [again], MODEL)
    assert isinstance(world.events["r"][0], Started), "no width of its former self is told"


# --- what planning takes -------------------------------------------------------------------------------


def calls_of_steps(world: World) -> list[int]:
    """From now on, the function calls of each `schedule` and each `update`."""
    counts: list[int] = []

    def counting(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*arguments: Any) -> Any:
            counts.append(0)

            def count(frame: object, event: str, argument: object) -> None:
                counts[-1] += event in ("call", "c_call")

            gc.disable()  # who listens to the collector would be counted, too
            sys.setprofile(count)
            try:
                return inner(*arguments)
            finally:
                sys.setprofile(None)
                gc.enable()

        return outer

    for name in ("schedule", "update"):
        setattr(world.scheduler, name, counting(getattr(world.scheduler, name)))
    return counts


def test_a_step_costs_the_same_whatever_the_pool_holds_and_whatever_came_before() -> None:
    """The branches of a request decode their fourth to eighth token: the calls of these steps."""

    def calls(pages: int, prompt: int, first: int) -> int:
        setting = Setting(num_pages=pages, policy="eager", in_flight=0, max_context=1000, max_chunk=32)
        world = World(setting, TALKS_ON)
        serving = (serial(first), fork(6, tokens=12))
        world.add(request("r", *serving, prompt=prompt))
        world.run_until(lambda: world.emitted("r") == first + 6 * 3)
        counts = calls_of_steps(world)
        world.run_until(lambda: world.emitted("r") == first + 6 * 8)
        return sum(counts)

    little = calls(pages=60, prompt=7, first=40)
    assert calls(pages=3000, prompt=7, first=40) == little
    assert calls(pages=300, prompt=307, first=140) == pytest.approx(little, rel=0.02), "the predictor learns"
    assert little < 5000


def test_a_page_of_a_prefix_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[bytes] = []

    def insert(cache: PrefixCache, key: bytes, page: int) -> int:
        listed.append(key)
        return known(cache, key, page)

    known = PrefixCache.insert
    monkeypatch.setattr(PrefixCache, "insert", insert)
    world = World(Setting(page_size=4), TALKS_ON)
    world.run([request("a", serial(60), prompt=30)])
    assert len(listed) == (30 + 60 - 1) // 4
    world.run([request("b", serial(1), prompt=30)])
    assert len(listed) == (30 + 60 - 1) // 4, "these were known"


# --- the rest ------------------------------------------------------------------------------------------


def test_a_policy_may_change_at_any_time() -> None:
    load = [request("a", fork(5, tokens=20)), request("b", fork(5, tokens=20))]
    world = World(Setting(policy="off"), MODEL)
    for wanted in load:
        world.add(wanted)
    for name in ("eager", "cap:2", "off", "taper") * 3:
        world.scheduler.controller.set_policy(name)
        world.step()
        world.step()
    with pytest.raises(ValueError, match="unknown policy"):
        world.scheduler.controller.set_policy("fast")
    assert world.scheduler.controller.policy.name == "taper"
    world.run([])
    assert_says(world, load, MODEL)


def test_steps_are_updated_in_the_order_of_their_launch() -> None:
    world = World(Setting(), TALKS_ON)
    world.add(request("r", serial(9)))
    first, second = world.launch(), world.launch()
    assert first is not None
    assert second is not None
    with pytest.raises(AssertionError, match="in the order"):
        world.scheduler.update(StepResult(second.step, (), 0.001), 0.0)


def test_load_counts_what_runs_and_what_waits() -> None:
    world = World(Setting(num_pages=20, page_size=4, policy="eager"), TALKS_ON)
    world.add(request("a", fork(3, tokens=9), prompt=8))
    world.add(request("b", serial(9), prompt=60))
    world.run_until(lambda: world.emitted("a") > 3)
    load = world.scheduler.load()
    assert (load.running_requests, load.running_branches, load.queued_requests) == (1, 3, 1)
    assert (load.kv_used_tokens, load.kv_capacity_tokens) == (4 * world.pool.owned, 80)
    assert not world.scheduler.idle


def test_with_nothing_to_do_there_is_no_step() -> None:
    world = World(Setting(), TALKS_ON)
    assert world.scheduler.idle
    assert world.launch() is None


def test_a_model_driven_fork_that_does_not_fit_decodes_on() -> None:
    chain = tokens("a<Goal><Outline>1:</Goal>c")
    model = SymbolicModel(chain[-1:], {token: [after] for token, after in pairwise(chain)})
    program = TagProgram(grammar=MULTIVERSE, stopping=stopping(60), branch_max_tokens=40)
    wanted = Request(id="r", prompt=tokens("a"), program=program)
    roomy, tight = (serve([wanted], Setting(num_pages=pages), model) for pages in (60, 16))
    assert len(roomy.answer("r")) == 2
    assert len(tight.answer("r")) == 1
    assert tight.emitted("r") == 60


def test_no_width_is_told_before_the_start() -> None:
    world = serve([request("r", fork(3), prompt=30)], Setting(policy="eager", max_chunk=4), TALKS_ON)
    kinds = [type(event) for event in world.events["r"]]
    assert kinds[0] is Started
    assert WidthChanged in kinds


def test_events_come_in_the_order_of_occurrence() -> None:
    world = serve([request("a", *NESTED), request("b", *NESTED)], Setting(policy="eager"), MODEL)
    for name in "ab":
        opened: set[int] = set()
        for event in world.events[name]:
            assert_in_order(event, opened)


def assert_in_order(event: Event, opened: set[int]) -> None:
    match event:
        case StageStarted(branches=infos):
            assert all(info.branch not in opened for info in infos)
            opened.update(info.branch for info in infos)
        case TokenEmitted(branch=branch):
            assert branch in opened
        case StageFinished(branch=branch):
            opened.discard(branch)
        case Joined(branches=branches):
            assert opened.isdisjoint(branches)
        case _:
            pass
