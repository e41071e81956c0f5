"""What every engine promises at the door: in this process, behind a channel, or made up for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from model.config import PRESETS
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.events import Finished, StageFinished, StageStarted, Started, TokenEmitted
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from scheduler.stopping import FinishReason, Stopping
from serve.config import ServerConfig
from serve.door import Engine, Failed, Refused, StepRecord, Watcher
from serve.engine.engine import InProcessEngine
from serve.remote.channel import Channel
from serve.remote.child import EngineHost
from serve.remote.child import Started as Begun
from serve.remote.engine import RemoteEngine
from serve.served import Platform
from serve.text.codec import TextCodec
from tests.serve.fakes import ByteTokenizer, FakeEngine, begin, finished, say
from tests.serve.waiting import Listener, until

PATIENT = Slo(tpot=10.0, ttft=60.0)


def request(id: str, tokens: int = 5, slo: Slo = PATIENT) -> Request:
    stages = (SerialStage(stopping=Stopping(max_tokens=tokens)),) if tokens else ()
    return Request(id=id, prompt=(1, 2, 3), program=Plan(stages=stages), slo=slo)


@dataclass
class Gate:
    """A device that waits before each step until it may go on."""

    open: threading.Event

    def launch(self, step: Step) -> Gate.Launched:
        return Gate.Launched(self.open, sum(entry.samples for entry in step.entries))

    @dataclass
    class Launched:
        open: threading.Event
        count: int

        def is_ready(self) -> bool:
            return False

        def samples(self) -> tuple[Sample, ...]:
            self.open.wait(10)
            return (Sample(65),) * self.count


def inside(
    may_go_on: threading.Event, watch: Watcher, before_plan: Callable[[], None] = lambda: None
) -> InProcessEngine:
    config = SchedulerConfig(num_pages=64, page_size=4, num_slots=16, max_context=200, reserve=1.0)
    controller = Controller(StepLatencyModel({4: 1e-3, 8: 1e-3}))
    scheduler = Scheduler(config, controller, TextCodec(ByteTokenizer()))
    engine = InProcessEngine(scheduler, Gate(may_go_on), watch=watch, before_plan=before_plan)
    engine.start()
    return engine


def behind_a_channel(may_go_on: threading.Event, watch: Watcher) -> Engine:
    """Both ends in this process: its threads, messages and order are those of two."""

    def start(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None]) -> Begun:
        return Begun(inside(may_go_on, watch, before_plan), PRESETS["qwen3-0.6b"], Platform())

    ours, theirs = map(Channel, socket.socketpair())
    threading.Thread(target=EngineHost(theirs, start, lambda: None).run).start()
    engine = RemoteEngine(ours, watch, kill=lambda: pytest.fail("it should end by itself"))
    engine.begin(ServerConfig())
    engine.up()
    return engine


def fake(may_go_on: threading.Event, watch: Watcher) -> Engine:
    del watch  # its steps are nobody's

    def serve(engine: FakeEngine, request: Request) -> None:
        assert isinstance(request.program, Plan)
        most = request.program.stages[0].parts[0].stopping.max_tokens
        engine.tell(request.id, Started(request.id, 3, 0), begin(request.id, 0))
        may_go_on.wait(10)
        for count in range(1, most + 1):
            engine.tell(request.id, *say(request.id, 0, "A", count))
        end = StageFinished(request.id, 0, 0, FinishReason.MAX_TOKENS, None, most, final=True)
        engine.tell(request.id, end, finished(request.id, most))

    return FakeEngine(serve)


@pytest.fixture
def may_go_on() -> Iterator[threading.Event]:
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


@pytest.fixture
def steps() -> list[StepRecord]:
    return []


@pytest.fixture(params=[inside, behind_a_channel, fake], ids=["in process", "behind a channel", "fake"])
def engine(
    request: pytest.FixtureRequest, may_go_on: threading.Event, steps: list[StepRecord]
) -> Iterator[Engine]:
    made = request.param(may_go_on, steps.append)
    yield made
    may_go_on.set()
    made.stop(drain=False, timeout=10.0)


def refusal(engine: Engine, asked: Request) -> str:
    listener = Listener()
    engine.submit(asked, listener)
    (refused,) = listener.wait()
    assert isinstance(refused, Refused)
    assert refused.detail
    return refused.reason


def test_a_requests_events_come_in_order_and_its_id_is_free_afterwards(engine: Engine) -> None:
    for _ in range(2):
        listener = Listener()
        engine.submit(request("r"), listener)
        events = listener.wait()
        assert isinstance(events[0], Started)
        assert isinstance(events[1], StageStarted)
        assert [e.completion_tokens for e in events if isinstance(e, TokenEmitted)] == [1, 2, 3, 4, 5]
        assert isinstance(events[-2], StageFinished)
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.completion_tokens == 5
        assert all(batch for batch in listener.batches), "a call of a sink brings something"


def test_requests_are_taken_until_the_stop(engine: Engine) -> None:
    assert engine.state == "SERVING"
    engine.stop(drain=True, timeout=10.0)
    assert engine.state == "STOPPED"
    assert refusal(engine, request("late")) == "DRAINING"


def test_an_id_belongs_to_one_request_at_a_time(engine: Engine, may_go_on: threading.Event) -> None:
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r"), listener)
    assert refusal(engine, request("r")) == "DUPLICATE"
    may_go_on.set()
    assert isinstance(listener.wait()[-1], Finished)


@pytest.mark.parametrize("engine", [inside, behind_a_channel], indirect=True)
def test_who_would_rather_be_refused_than_late_is_told_at_once_or_once_it_is_sure(
    engine: Engine, may_go_on: threading.Event
) -> None:
    """Two requests of 150 tokens have no room on 256 positions."""
    first, waits, hopeless = Listener(), Listener(), Listener()
    engine.submit(request("first", 150), first)
    until(lambda: engine.load().scheduler.running_requests == 1)
    may_go_on.clear()
    engine.submit(request("waits", 150, Slo(tpot=10.0, ttft=1.2, reject=True)), waits)
    engine.submit(request("hopeless", 150, Slo(tpot=10.0, ttft=1e-3, reject=True)), hopeless)
    (refused,) = hopeless.wait()
    assert isinstance(refused, Refused)
    assert refused.reason == "SLO_UNATTAINABLE"
    assert refused.retry_after
    time.sleep(1.2)
    assert not waits.ended.is_set()
    may_go_on.set()
    (refused,) = waits.wait()
    assert isinstance(refused, Refused)
    assert refused.reason == "SLO_UNATTAINABLE"
    assert isinstance(first.wait()[-1], Finished)
    engine.submit(request("waits"), again := Listener())
    assert isinstance(again.wait()[-1], Finished)


def test_a_program_that_cannot_run_is_no_refusal(engine: Engine) -> None:
    listener = Listener()
    engine.submit(request("r", tokens=0), listener)
    (failed,) = listener.wait()
    assert isinstance(failed, Failed)
    assert "at least one stage" in failed.error
    assert engine.load().scheduler.queued_requests == 0
    assert engine.state == "SERVING", "it is the request's fault alone"


def test_a_cancelled_request_is_gone_at_once(engine: Engine, may_go_on: threading.Event) -> None:
    may_go_on.clear()
    listener, other = Listener(), Listener()
    engine.submit(request("r"), listener)
    engine.cancel("r")
    engine.cancel("r")  # it is known no more
    until(lambda: not engine.load().scheduler.running_requests)
    engine.submit(request("r", tokens=2), other)
    may_go_on.set()
    assert isinstance(other.wait()[-1], Finished)
    assert not any(isinstance(event, Finished) for batch in listener.batches for event in batch)


def test_the_policy_is_switched_by_name(engine: Engine) -> None:
    assert engine.policy == "taper"
    engine.set_policy("eager")
    assert engine.policy == "eager"
    with pytest.raises(ValueError, match="fastest"):
        engine.set_policy("fastest")
    assert engine.policy == "eager"


def test_a_drain_finishes_what_runs_and_refuses_what_comes(
    engine: Engine, may_go_on: threading.Event
) -> None:
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r"), listener)
    stopping = threading.Thread(target=engine.stop, kwargs={"drain": True, "timeout": 30.0})
    stopping.start()
    while engine.state == "SERVING":
        pass
    assert engine.state == "DRAINING"
    assert refusal(engine, request("late")) == "DRAINING"
    may_go_on.set()
    assert isinstance(listener.wait()[-1], Finished)
    stopping.join(30)
    assert engine.state == "STOPPED"


def test_a_stop_without_a_drain_tells_those_that_run(engine: Engine, may_go_on: threading.Event) -> None:
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r", tokens=100), listener)
    stopping = threading.Thread(target=engine.stop, kwargs={"drain": False, "timeout": 10.0})
    stopping.start()
    while engine.state != "STOPPED":
        pass
    may_go_on.set()
    assert isinstance(listener.wait()[-1], Failed)
    stopping.join(30)


def test_load_counts_what_runs(engine: Engine, may_go_on: threading.Event) -> None:
    assert engine.load().scheduler.running_requests == 0
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r"), listener)
    until(lambda: engine.load().scheduler.running_requests + engine.load().scheduler.queued_requests == 1)
    assert engine.load().scheduler.kv_capacity_tokens > 0
    may_go_on.set()
    listener.wait()
