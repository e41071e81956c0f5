"""The scheduler's rules: who gets in, who starts, who gives way, who is gone."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from scheduler.controller import ControllerConfig
from scheduler.events import (
    Event,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    TokenEmitted,
    WidthChanged,
)
from scheduler.grammars import MULTIVERSE
from scheduler.pages import PrefixCache
from scheduler.program import Plan, TagProgram
from scheduler.request import Request, Slo
from scheduler.scheduler import RejectedError, Scheduler
from scheduler.step import StepResult
from tests.scheduler.alphabet import LETTERS, PLAIN, Alphabet, tokens
from tests.scheduler.interpreter import Interpreter
from tests.scheduler.requests import fork, request, serial, stopping
from tests.scheduler.strategies import RELAXED
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, World, assert_says, serve

TALKS_ON = SymbolicModel(LETTERS)
MODEL = SymbolicModel(PLAIN)
UNFILLED = ControllerConfig(rho=0.8, repay=0.0, fill=False)
FLOOR_ONLY = ControllerConfig(rho=0.0, fill=False)
NEVER = Slo(tpot=math.inf, ttft=math.inf)


# --- who gets in ---------------------------------------------------------------------------------------


def rejection(world: World, wanted: Request) -> str:
    with pytest.raises(RejectedError) as caught:
        world.add(wanted)
    return caught.value.reason


def test_an_id_cannot_be_used_twice_at_a_time() -> None:
    world = World(Setting(), TALKS_ON)
    world.add(request("r", serial(3)))
    assert rejection(world, request("r", serial(3))) == "DUPLICATE"
    world.step()
    assert rejection(world, request("r", serial(3))) == "DUPLICATE"
    world.run([])
    world.run([request("r", serial(3))])


def test_the_queue_is_bounded_and_running_requests_are_not_in_it() -> None:
    world = World(Setting(), TALKS_ON)
    world.scheduler.config = replace(world.scheduler.config, max_queue=2)
    world.add(request("a", serial(9)))
    world.add(request("b", serial(9)))
    assert rejection(world, request("c", serial(9))) == "QUEUE_FULL"
    world.step()
    world.add(request("c", serial(9)))


def test_a_request_that_could_never_fit_is_refused_and_one_that_just_fits_runs() -> None:
    world = World(Setting(num_pages=4, page_size=4), TALKS_ON)
    assert rejection(world, request("r", serial(13))) == "KV_FULL"
    assert rejection(world, request("r", fork(4, tokens=3))) == "KV_FULL"
    world.run([request("a", serial(12)), request("b", fork(3, tokens=3))])


def test_what_could_never_fit_is_told_so_even_where_the_queue_is_full() -> None:
    world = World(Setting(num_pages=4, page_size=4), TALKS_ON)
    world.scheduler.config = replace(world.scheduler.config, max_queue=1)
    world.add(request("a", serial(3)))
    assert rejection(world, request("r", serial(13))) == "KV_FULL"
    assert rejection(world, request("r", serial(12))) == "QUEUE_FULL"


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


# --- who starts ----------------------------------------------------------------------------------------


def test_a_request_waits_until_its_worst_case_fits_beside_what_the_others_still_read() -> None:
    world = World(Setting(num_pages=10, page_size=4, max_chunk=4), TALKS_ON)
    world.add(request("a", serial(4), prompt=20))
    world.add(request("b", serial(4), prompt=17))
    world.step()
    assert world.pool.available == 9, "enough for b's 6, if a's prompt had not to be read"
    assert world.running == ["a"]
    world.run([])


@pytest.mark.parametrize(("reserve", "together"), [(0.0, True), (0.5, True), (1.0, False)])
def test_what_running_requests_may_still_grow_by_is_left_to_them(reserve: float, together: bool) -> None:
    """Of 16 pages a holds 1 and may grow by 9; b may need 10."""
    setting = Setting(num_pages=16, page_size=4, reserve=reserve)
    world = World(setting, TALKS_ON)
    world.add(request("a", serial(36), prompt=4))
    world.run_until(lambda: world.emitted("a") > 1)
    world.add(request("b", serial(36), prompt=4))
    world.step()
    assert (world.running == ["a", "b"]) == together
    world.run([])


def test_nothing_overtakes_a_request_that_waits_for_pages() -> None:
    world = World(Setting(num_pages=10, page_size=4), TALKS_ON)
    world.add(request("a", serial(12), prompt=20))
    world.add(request("large", serial(20), prompt=20))
    world.add(request("small", serial(1), prompt=2))
    world.run_until(lambda: world.emitted("a") > 3)
    assert world.running == ["a"]
    world.run([])


def test_alone_any_request_starts() -> None:
    world = serve([request("a", serial(3), slo=Slo(tpot=1e-9, ttft=1e-9))], Setting(), TALKS_ON)
    assert not world.finished("a").timing.tpot_slo_met


def test_who_has_missed_the_ttft_target_starts_after_the_others_but_for_one_start_in_eight() -> None:
    world = World(Setting(buckets=(1,), in_flight=0), TALKS_ON)  # one at a time
    for number in range(3):
        world.add(request(f"late{number}", serial(1), slo=Slo(tpot=1.0, ttft=0.001)))
    world.now = 1.0
    for number in range(18):
        world.add(request(f"live{number}", serial(1), slo=Slo(tpot=1.0, ttft=60.0)))
    world.run([])
    first = [name for name, events in world.events.items() if isinstance(events[0], Started)]
    assert [n for n, name in enumerate(first) if name.startswith("late")] == [7, 15, 20]
    assert [name for name in first if name.startswith("live")] == [f"live{n}" for n in range(18)]


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


# --- giving way ----------------------------------------------------------------------------------------


def test_the_youngest_gives_way_and_goes_on_first() -> None:
    world = World(Setting(num_pages=16, page_size=4, policy="eager", prefix_cache=False), TALKS_ON)
    for number in range(4):
        world.add(request(f"r{number}", serial(40 - number), prompt=4))
    world.run([])
    preempted = {name: world.finished(name).usage.preemptions for name in world.events}
    assert preempted["r0"] == 0
    assert preempted["r3"] >= 1
    order = sorted(world.events, key=lambda n: world.finished(n).timing.total)
    assert order[0] == "r0"


def test_the_preempted_come_back_in_the_order_of_their_age() -> None:
    world = World(Setting(num_pages=18, page_size=4, policy="eager", prefix_cache=False), TALKS_ON)
    for number in range(4):
        world.add(request(f"r{number}", serial(40), prompt=4))
    waiting: list[str] = []
    while not world.scheduler.idle:
        world.step()
        names = [live.request.id for live in world.scheduler.preempted]
        assert names == sorted(names)
        waiting = max(waiting, names, key=len)
    assert waiting == ["r1", "r2", "r3"]


def test_the_queue_waits_behind_the_preempted() -> None:
    world = World(Setting(num_pages=16, page_size=4, policy="eager", prefix_cache=False), TALKS_ON)
    world.add(request("old", serial(40), prompt=4))
    world.add(request("young", serial(40), prompt=4))
    world.run_until(lambda: bool(world.scheduler.preempted))
    world.add(request("new", serial(1), prompt=2))
    assert world.scheduler.load().queued_requests == 2
    while world.scheduler.preempted:
        world.step()
        assert "new" not in world.running or not world.scheduler.preempted
    world.run([])


@pytest.mark.parametrize("reserve", [1.0, 0.1, 0.0])
def test_a_client_whose_limits_do_not_fit_together_holds_up_its_own_requests_alone(reserve: float) -> None:
    world = World(Setting(num_pages=50, page_size=4, reserve=reserve, policy="off"), TALKS_ON)
    for name in ("first", "second"):
        world.add(request(name, serial(160), client="greedy", cache_salt=name))
    world.run_until(lambda: world.emitted("first") > 110)
    assert [live.request.id for live in world.scheduler.preempted] == ([] if reserve == 1.0 else ["second"])
    world.add(request("third", serial(1), client="greedy"))
    world.add(request("small", serial(6), client="other"))
    world.run_until(lambda: world.emitted("small") > 0, most=5)
    assert not world.emitted("third")
    world.run([])


def test_a_preempted_request_is_passed_by_others_that_were_if_their_clients_have_no_more() -> None:
    """`bulky` is older, and has no room beside the one that runs; `sole` has."""
    world = World(Setting(num_pages=40, page_size=4, policy="off", prefix_cache=False), TALKS_ON)
    for name, length, client in (("runs", 150, "greedy"), ("bulky", 140, "greedy"), ("sole", 60, "other")):
        world.add(request(name, serial(length), client=client))
        world.run_until(lambda name=name: name in world.running)
    preempted: list[tuple[str, ...]] = []
    while not world.is_finished("runs"):
        world.step()
        preempted.append(tuple(live.request.id for live in world.scheduler.preempted))
    assert [*dict.fromkeys(preempted)] == [(), ("sole",), ("bulky", "sole"), ("bulky",)]
    world.run([])


def test_nobody_is_passed_who_has_no_other_request() -> None:
    world = World(Setting(num_pages=16, page_size=4, policy="eager", prefix_cache=False), TALKS_ON)
    for name in ("old", "young"):
        world.add(request(name, serial(40), prompt=4, client=name))
    world.run_until(lambda: bool(world.scheduler.preempted))
    world.add(request("new", serial(1), prompt=2, client="new"))
    while world.scheduler.preempted:
        world.step()
        assert "new" not in world.running or not world.scheduler.preempted
    world.run([])


READING = Setting(
    num_pages=15,
    page_size=4,
    policy="off",
    buckets=(8,),
    prompt_floor=2,
    max_chunk=2,
    controller=ControllerConfig(rho=0.0, fill=False),
    prefix_cache=False,
    in_flight=0,
)


def test_who_is_preempted_before_its_first_token_is_given_up_once_that_will_be_late() -> None:
    world = World(READING, TALKS_ON)
    slo = Slo(tpot=0.01, ttft=90.0)
    world.add(request("old", serial(40), slo=slo))
    world.run_until(lambda: world.emitted("old") == 1)
    begin = world.now
    world.add(request("reading", serial(4), prompt=40, slo=replace(slo, ttft=0.06, reject=True)))
    world.run_until(lambda: bool(world.scheduler.preempted))
    given_up: list[str] = []
    while not given_up:
        world.step()
        given_up = world.scheduler.give_up_late(world.now)
    assert given_up == ["reading"]
    assert world.now < begin + 0.06
    world.run([])


def test_a_request_without_pages_is_not_preempted_in_vain() -> None:
    """The youngest has begun, and read nothing yet."""
    world = World(READING, TALKS_ON)
    slo = Slo(tpot=0.01, ttft=90.0)
    world.add(request("old", serial(40), prompt=4, slo=slo))
    world.run_until(lambda: world.emitted("old") == 1)
    world.add(request("reading", serial(4), prompt=40, slo=slo))
    world.add(request("waiting", serial(1), prompt=8, slo=replace(slo, ttft=99.0)))
    world.run_until(lambda: bool(world.scheduler.preempted), most=60)
    assert world.running == ["old", "waiting"]
    world.run([])
    assert world.finished("waiting").usage.preemptions == 0


def test_the_tails_of_branches_go_before_their_request() -> None:
    load = [request("old", serial(40), prompt=8), request("young", fork(4, tokens=20), prompt=8)]
    world = serve(load, Setting(num_pages=28, page_size=4, policy="eager", prefix_cache=False), MODEL)
    assert_says(world, load, MODEL)
    assert world.tails_dropped == 1, "no more than are needed"
    assert world.finished("young").usage.preemptions == 0


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
