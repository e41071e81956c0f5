"""The engine: cancels take effect at once, a drain finishes what runs, a crash is told to everybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from jax.errors import JaxRuntimeError

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller, ControllerConfig
from scheduler.events import Finished, TokenEmitted
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler
from scheduler.step import Entry, FinishedStep, Sample, Step
from serve.door import Failed, News, Refused, is_last
from serve.engine.collector import Collector
from serve.engine.engine import InProcessEngine
from serve.engine.runner import GarbageError, Runner
from serve.rate import TokenRate
from tests.serve.conftest import BUCKETS
from tests.serve.engine.timed import Timed
from tests.serve.lab import NUM_PAGES, NUM_SLOTS, PAGE_SIZE, Letters, answer, run
from tests.serve.loads import load, parallel, serial
from tests.serve.waiting import Listener

SLO = Slo(tpot=10.0, ttft=60.0)


def scheduler(num_pages: int = NUM_PAGES, **settings: object) -> Scheduler:
    sizes = {"num_pages": num_pages, "page_size": PAGE_SIZE, "num_slots": NUM_SLOTS, "max_context": 512}
    latency = StepLatencyModel(dict.fromkeys(BUCKETS, 1e-3))
    policy, chunk = str(settings.pop("policy", "taper")), int(settings.pop("max_chunk", 512))
    config = SchedulerConfig(**(sizes | settings))
    return Scheduler(config, Controller(latency, policy, ControllerConfig(max_chunk=chunk)), Letters())


@dataclass
class Device:
    """Answers every sample with token 65, and calls `hook` before each step."""

    hook: Callable[[Step], None] = lambda step: None

    def launch(self, step: Step) -> Device:
        self.hook(step)
        return Device.Flown(step)  # type: ignore[return-value]

    @dataclass
    class Flown:
        step: Step

        def is_ready(self) -> bool:
            return True

        def samples(self) -> tuple[Sample, ...]:
            return tuple(Sample(65) for entry in self.step.entries if entry.samples)


def request(id: str, *stages: object, prompt: int = 5) -> Request:
    return Request(id=id, prompt=tuple(range(70, 70 + prompt)), program=Plan(stages=stages), slo=SLO)  # type: ignore[arg-type]


VICTIM = request("victim", serial(6), parallel("kv", 2, 14, 14), serial(6, (35, 36)), prompt=40)

PHASES: dict[str, Callable[[list[Entry], int], bool]] = {
    "queued": lambda mine, step: step == 4 and not mine,
    "mid-prompt": lambda mine, step: any(not e.samples and e.ordinal > 0 for e in mine),
    "serial decode": lambda mine, step: any(e.tokens is None and not e.path for e in mine),
    "inside a fork": lambda mine, step: any(e.path for e in mine),
    "between fork and join": lambda mine, step: any(e.path and e.ordinal > 8 for e in mine),
    "after the join": lambda mine, step: any(not e.path and len(e.context) > 1 for e in mine),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_cancel_frees_everything_before_the_next_plan(exact_runner: Runner, phase: str) -> None:
    mates = [r for r in load(SLO) if r.id.endswith("-0")][:4]
    alone = {r.id: run(exact_runner, [r], policy="off").answers()[r.id] for r in mates}
    steps: list[Step] = []

    class Cancelling:
        def launch(self, step: Step) -> object:
            assert submitted.wait(10)
            steps.append(step)
            mine = [entry for entry in step.entries if entry.request_id == "victim"]
            if "victim" not in cancelled_at and PHASES[phase](mine, len(steps)):
                cancelled_at["victim"] = len(steps)
                with engine._wake:  # the engine goes on meanwhile
                    live = sched.load()
                    engine.cancel("victim")
                    engine.cancel("victim")  # finds nothing
                    sched.check()
                    freed = live.kv_used_tokens - sched.load().kv_used_tokens
                assert freed > 0 if phase != "queued" else live.queued_requests > 0
            return exact_runner.launch(step)

    cancelled_at: dict[str, int] = {}
    submitted = threading.Event()
    # Pages for the mates and, unless it is to stay queued, for the victim too.
    sched = scheduler(23 if phase == "queued" else NUM_PAGES, max_chunk=7)
    engine = InProcessEngine(sched, Cancelling())  # type: ignore[arg-type]
    listeners = {r.id: Listener() for r in mates}
    heard: list[News] = []
    engine.start()
    for mate in mates:
        engine.submit(mate, listeners[mate.id])
    engine.submit(VICTIM, heard.extend)
    submitted.set()
    answers = {name: answer(listener.wait(60)) for name, listener in listeners.items()}  # type: ignore[arg-type]
    engine.stop(drain=True, timeout=10)
    assert cancelled_at, "the phase never came"
    assert answers == alone
    after = steps[cancelled_at["victim"] + 1 :]  # one more plan may have been made already
    assert not [e for step in after for e in step.entries if e.request_id == "victim"]
    assert not any(isinstance(event, Finished) for event in heard)
    sched.check()
    assert sched.load().kv_used_tokens == 0


def test_a_crash_is_told_to_every_request() -> None:
    def crash(step: Step) -> None:
        if step.step_id == 3:
            raise RuntimeError("the device is gone")

    listener = Listener()
    engine = InProcessEngine(scheduler(), Device(crash))
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    last = listener.wait()[-1]
    assert isinstance(last, Failed)
    assert "the device is gone" in last.error
    assert isinstance(answer_at_once(engine, request("late", serial(1))), Refused)
    assert engine.state == "FAILED"
    engine.stop(drain=True, timeout=5)
    assert engine.state == "FAILED", "who asks later learns of it too"


OOM = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 123456 bytes.")


@pytest.mark.parametrize("when", ["launch", "is_ready", "samples"])
@pytest.mark.parametrize(
    ("crash", "said"),
    [
        (OOM, "a step found no memory: start again with fewer --num-pages or smaller --buckets (RESOURCE_EX"),
        (SystemExit(3), "a step failed: SystemExit: 3"),
        (RuntimeError("a bug\nwith lines"), "a step failed: RuntimeError: a bug with lines"),
        (GarbageError(-7), "a step failed: GarbageError: the device came to token -7"),
    ],
    ids=["out of memory", "exit", "bug", "garbage"],
)
def test_whatever_a_step_raises_ends_the_engine_which_says_why_in_a_line(
    when: str, crash: BaseException, said: str
) -> None:
    class Flown(Device.Flown):
        def is_ready(self) -> bool:
            return raised_at("is_ready", super().is_ready())

        def samples(self) -> tuple[Sample, ...]:
            return raised_at("samples", super().samples())

    class Crashing:
        steps = 0

        def launch(self, step: Step) -> Flown:
            self.steps = step.step_id
            return raised_at("launch", Flown(step))

    def raised_at(here: str, result: Any) -> Any:
        if here == when and device.steps >= 3:
            raise crash
        return result

    device, listener = Crashing(), Listener()
    engine = InProcessEngine(scheduler(), device)  # type: ignore[arg-type]
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    assert isinstance(listener.wait()[-1], Failed)
    engine.wait()
    assert engine.state == "FAILED"
    assert engine.failure.startswith(said)
    assert "\n" not in engine.failure


def test_a_failure_counts_even_where_it_cannot_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        def exception(self, text: str) -> None:
            states.append(engine.state)

    def crash(step: Step) -> None:
        raise RuntimeError("the device is gone")

    states: list[str] = []
    monkeypatch.setattr("serve.engine.engine.log", Log())
    listener = Listener()
    engine = InProcessEngine(scheduler(), Device(crash))
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    assert isinstance(listener.wait()[-1], Failed)
    assert states == ["FAILED"], "it is known before it is said: to say it may fail"


def test_what_came_before_a_crash_is_told_before_it() -> None:
    def crash(step: Step) -> None:
        if step.step_id == 6:
            raise RuntimeError("the device is gone")

    listener = Listener()
    engine = InProcessEngine(scheduler(), Device(crash))
    engine.start()
    engine.submit(request("r", serial(20)), listener)
    *told, last = listener.wait()
    engine.stop(drain=False, timeout=5)
    assert isinstance(last, Failed)
    counts = [event.completion_tokens for event in told if isinstance(event, TokenEmitted)]
    assert counts == [1, 2, 3, 4, 5, 6], "step 5 was under way, and has ended"


def answer_at_once(engine: InProcessEngine, asked: Request) -> News:
    """What a request that is not taken hears of it, before `submit` returns."""
    listener = Listener()
    engine.submit(asked, listener)
    (news,) = listener.news
    return news


def test_refusals_say_why() -> None:
    engine = InProcessEngine(scheduler(num_pages=8), Device())
    assert answer_at_once(engine, request("early", serial(1))) == Refused(
        "STARTING", "the server is starting"
    )
    engine.start()
    refused = answer_at_once(engine, request("large", serial(400)))
    assert isinstance(refused, Refused)
    assert refused.reason == "KV_FULL"
    failed = answer_at_once(engine, request("odd", parallel("kv", 2, 2), serial(2)))
    assert isinstance(failed, Failed)
    assert "after a kv join needs a prefix" in failed.error
    engine.stop(drain=True, timeout=5)


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


def serve_one(engine: InProcessEngine, tokens: int) -> None:
    engine.start()
    listener = Listener()
    engine.submit(request("r", serial(tokens)), listener)
    listener.wait()
    engine.stop(drain=True, timeout=5)


@pytest.mark.parametrize("crash", [False, True])
def test_a_stopped_engine_leaves_no_thread(crash: bool) -> None:
    def hook(step: Step) -> None:
        if crash and step.step_id == 2:
            raise RuntimeError("the device is gone")

    before = {*threading.enumerate()}
    serve_one(InProcessEngine(scheduler(), Device(hook)), 5)
    assert {*threading.enumerate()} <= before


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


def test_who_is_cancelled_before_a_step_is_told_hears_nothing_of_it() -> None:
    """Not even if another has taken the id."""
    looks, gone, listener = 0, Listener(), Listener()

    def look() -> None:
        nonlocal looks, heard
        looks += 1
        if looks == 5:  # step 2 has ended
            engine.cancel("r")
            heard = len(gone.news)
            engine.submit(request("r", serial(2)), listener)

    heard = -1
    engine = InProcessEngine(scheduler(), Device(), before_plan=look)
    engine.start()
    engine.submit(request("r", serial(20)), gone)
    events = listener.wait()
    engine.stop(drain=True, timeout=5)
    assert len(gone.news) == heard > 0
    assert [event.completion_tokens for event in gone.news if isinstance(event, TokenEmitted)] == [1, 2]
    assert [event.completion_tokens for event in events if isinstance(event, TokenEmitted)] == [1, 2]


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


def test_an_engine_whose_last_request_is_cancelled_before_the_plan_goes_on_waiting() -> None:
    def look() -> None:
        if cancelling:
            engine.cancel(cancelling.pop())

    cancelling = ["gone"]
    engine = InProcessEngine(scheduler(), Device(), before_plan=look)
    engine.start()
    engine.submit(request("gone", serial(5)), Listener())
    while cancelling:
        pass
    listener = Listener()
    engine.submit(request("r", serial(2)), listener)
    assert isinstance(listener.wait()[-1], Finished)
    engine.stop(drain=True, timeout=5)


def test_an_id_is_taken_until_its_end_is_told() -> None:
    engine, proceed = (
        InProcessEngine(scheduler(), Device(lambda step: proceed.wait(10) and None)),
        threading.Event(),
    )
    engine.start()
    listener = Listener()
    engine.submit(request("r", serial(2)), listener)
    refused = answer_at_once(engine, request("r", serial(2)))
    assert isinstance(refused, Refused)
    assert refused.reason == "DUPLICATE"
    proceed.set()
    listener.wait()
    engine.stop(drain=True, timeout=5)


def test_whoever_takes_the_id_of_a_cancelled_request_is_told_of_their_own_tokens_alone() -> None:
    cancelled, reached = threading.Event(), threading.Event()

    def hook(step: Step) -> None:
        if step.step_id == 5:
            reached.set()
            cancelled.wait(10)

    engine = InProcessEngine(scheduler(), Device(hook))
    engine.start()
    engine.submit(request("r", serial(20)), Listener())
    assert reached.wait(10)
    engine.cancel("r")
    listener = Listener()
    engine.submit(request("r", serial(2)), listener)
    cancelled.set()
    events = listener.wait()
    engine.stop(drain=True, timeout=5)
    assert [event.completion_tokens for event in events if isinstance(event, TokenEmitted)] == [1, 2]


def test_the_policy_switches_while_requests_run() -> None:
    engine = InProcessEngine(scheduler(policy="off"), Device())
    engine.set_policy("cap:3")
    assert engine.policy == "cap:3"
    with pytest.raises(ValueError, match="unknown policy"):
        engine.set_policy("fastest")
