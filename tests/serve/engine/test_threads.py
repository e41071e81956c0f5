"""What the engine's threads do at once, and whom they tell of a step."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from scheduler.events import Finished, TokenEmitted
from scheduler.step import FinishedStep, Step
from serve.door import News, is_last
from serve.engine.collector import Collector
from serve.engine.engine import InProcessEngine
from serve.rate import TokenRate
from tests.serve.engine.instant import Device, request, scheduler, serve_one
from tests.serve.engine.timed import Timed
from tests.serve.loads import parallel, serial
from tests.serve.waiting import Listener


@pytest.mark.parametrize("crash", [False, True])
def test_a_stopped_engine_leaves_no_thread(crash: bool) -> None:
    def hook(step: Step) -> None:
        if crash and step.step_id == 2:
            raise RuntimeError("the device is gone")

    before = {*threading.enumerate()}
    serve_one(InProcessEngine(scheduler(), Device(hook)), 5)
    assert {*threading.enumerate()} <= before


def test_one_sink_call_carries_all_branches_of_a_step() -> None:
    batches: list[Sequence[News]] = []
    done = threading.Event()

    def sink(events: Sequence[News]) -> None:
        batches.append(events)
        if isinstance(events[-1], Finished):
            done.set()

    engine = InProcessEngine(scheduler(policy="eager"), Device())
    engine.start()
    engine.submit(request("r", parallel("none", 5, 5, 5, 5)), sink)
    assert done.wait(30)
    engine.stop(drain=True, timeout=5)
    tokens = [sum(isinstance(event, TokenEmitted) for event in batch) for batch in batches]
    assert sum(tokens) == 20
    assert max(tokens) == 4


def test_the_engine_finishes_a_step_and_plans_the_next_but_one_while_a_step_is_launched() -> None:
    """A launch here returns only when the plan after it is made, for which the step before it must end."""
    told, sched = threading.Condition(), scheduler()
    schedule, planned = sched.schedule, 0

    def scheduled(now: float) -> object:
        nonlocal planned
        plan = schedule(now)
        with told:
            planned = plan.step.step_id if plan else 1_000
            told.notify_all()
        return plan

    def hook(step: Step) -> None:
        with told:
            assert told.wait_for(lambda: planned > step.step_id, timeout=10), (
                "the engine waits for the launch"
            )

    sched.schedule = scheduled  # type: ignore[method-assign]
    engine = InProcessEngine(sched, Device(hook))
    serve_one(engine, 12)
    assert engine.state == "STOPPED"


def test_a_reader_is_told_of_a_step_while_the_one_after_the_next_is_launched() -> None:
    """A slow reader holds no launch up: here it returns only when that launch has begun."""
    begun, launched, done = threading.Condition(), set[int](), threading.Event()

    def hook(step: Step) -> None:
        with begun:
            launched.add(step.step_id)
            begun.notify_all()

    def wait_for_launch(step: int) -> None:
        with begun:
            assert begun.wait_for(lambda: step in launched, timeout=10), "the launch waits"

    def sink(news: Sequence[News]) -> None:
        for event in news:
            if isinstance(event, TokenEmitted) and event.completion_tokens < 10:
                wait_for_launch(event.completion_tokens + 1)
        if is_last(news[-1]):
            done.set()

    engine = InProcessEngine(scheduler(), Device(hook))
    engine.start()
    engine.submit(request("r", serial(12)), sink)
    assert done.wait(30)
    engine.stop(drain=True, timeout=5)
    assert engine.state == "STOPPED"


def test_the_door_is_looked_at_before_every_plan() -> None:
    """So that what has been cancelled meanwhile is not in it."""
    happened, sched = list[str](), scheduler()
    schedule = sched.schedule

    def scheduled(now: float) -> object:
        happened.append("plan")
        return schedule(now)

    sched.schedule = scheduled  # type: ignore[method-assign]
    engine = InProcessEngine(sched, Device(), before_plan=lambda: happened.append("look"))
    serve_one(engine, 5)
    plans = happened.count("plan")
    assert plans >= 5
    assert happened[: 2 * plans] == ["look", "plan"] * plans


def test_load_says_how_many_tokens_came_in_the_last_seconds() -> None:
    timed, finished = Timed(), list[FinishedStep]()
    engine = InProcessEngine(timed.watch(scheduler()), timed, on_step=finished.append, clock=timed.clock)
    engine.start()
    listener = Listener()
    engine.submit(request("r", serial(8)), listener)
    listener.wait()
    rate = 8 / TokenRate.WINDOW
    assert engine.load().output_tokens_per_second == pytest.approx(rate)
    timed.now += TokenRate.WINDOW / 2
    assert engine.load().output_tokens_per_second == pytest.approx(rate)
    timed.now += TokenRate.WINDOW
    assert engine.load().output_tokens_per_second == 0.0
    later = Listener()
    engine.submit(request("later", serial(2)), later)
    later.wait()
    engine.stop(drain=True, timeout=5)
    assert engine.load().steps == len(finished) >= 8


def test_the_collector_learns_when_the_engine_is_idle_and_when_it_is_not() -> None:
    idle, calls = threading.Event(), list[tuple[str, float]]()

    class Noting(Collector):
        def start(self, now: float) -> None:
            calls.append(("start", now))

        def idle(self, now: float) -> None:
            calls.append(("idle", now))
            idle.set()

        def busy(self, now: float) -> None:
            calls.append(("busy", now))

    timed = Timed()
    engine = InProcessEngine(timed.watch(scheduler()), timed, collector=Noting(), clock=timed.clock)
    engine.start()
    assert idle.wait(10)
    assert calls == [("start", 0.0), ("idle", 0.0)]
    idle.clear()
    listener = Listener()
    engine.submit(request("r", serial(8)), listener)
    listener.wait()
    assert idle.wait(10), "it is idle again"
    engine.stop(drain=True, timeout=5)
    times = [now for name, now in calls if name == "busy"]
    assert len(times) == engine.load().steps
    assert times == sorted({*times}), "once a step, by the engine's clock"
