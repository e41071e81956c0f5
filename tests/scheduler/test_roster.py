"""The roster: which request starts next, which waits for which, and which gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.controller import ControllerConfig
from scheduler.events import Started
from scheduler.request import Slo
from tests.scheduler.alphabet import PLAIN
from tests.scheduler.requests import fork, request, serial
from tests.scheduler.symbolic import TALKS_ON, SymbolicModel
from tests.scheduler.world import Setting, World, assert_says, serve

MODEL = SymbolicModel(PLAIN)


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


def test_clients_take_turns_to_start() -> None:
    world = World(Setting(buckets=(1,), in_flight=0), TALKS_ON)  # one at a time
    for number in range(6):
        world.add(request(f"flood{number}", serial(3), client="flood"))
    world.step()
    world.add(request("quiet", serial(3), client="quiet"))
    world.run_until(lambda: bool(world.events["quiet"]))
    begun = [name for name, events in world.events.items() if events and name.startswith("flood")]
    assert len(begun) <= 2
    world.run([])


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
