"""What every engine promises at the door, whichever side of it does the work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from scheduler.controller import Controller
from scheduler.events import Event, Finished, StageFinished, StageStarted, Started, TokenEmitted
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler, SchedulerConfig
from scheduler.step import Sample, Step
from scheduler.stopping import FinishReason, Stopping
from serve.door import Engine, Failed, Refused, Sink
from serve.engine.engine import InProcessEngine
from serve.text.codec import TextCodec
from tests.serve.fakes import ByteTokenizer, FakeEngine, begin, finished, say

PATIENT = Slo(tpot=10.0, ttft=60.0)


def request(id: str, tokens: int = 5) -> Request:
    stages = (SerialStage(stopping=Stopping(max_tokens=tokens)),) if tokens else ()
    return Request(id=id, prompt=(1, 2, 3), program=Plan(stages=stages), slo=PATIENT)


class Listener:
    """The sink of a request."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Event | Failed]] = []
        self.ended = threading.Event()

    def __call__(self, events: Sequence[Event | Failed]) -> None:
        self.batches.append(events)
        if isinstance(events[-1], Finished | Failed):
            self.ended.set()

    def wait(self) -> list[Event | Failed]:
        assert self.ended.wait(30), "the request did not end"
        return [event for batch in self.batches for event in batch]


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


def in_process(may_go_on: threading.Event) -> Engine:
    config = SchedulerConfig(num_pages=64, page_size=4, num_slots=16, max_context=200)
    controller = Controller(StepLatencyModel({4: 1e-3, 8: 1e-3}))
    return InProcessEngine(Scheduler(config, controller, TextCodec(ByteTokenizer())), Gate(may_go_on))


def fake(may_go_on: threading.Event) -> Engine:
    def serve(engine: FakeEngine, request: Request) -> None:
        assert isinstance(request.program, Plan)
        most = request.program.stages[0].parts[0].stopping.max_tokens
        engine.tell(request.id, Started(request.id, 3, 0), begin(request.id, 0))
        may_go_on.wait(10)
        for count in range(1, most + 1):
            engine.tell(request.id, *say(request.id, 0, "A", count))
        end = StageFinished(request.id, 0, 0, FinishReason.MAX_TOKENS, None, most, final=True)
        engine.tell(request.id, end, finished(request.id, most))

    return FakeEngine(serve, state="STARTING")


Make = Callable[[threading.Event], Engine]


@pytest.fixture
def may_go_on() -> Iterator[threading.Event]:
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


@pytest.fixture(params=[in_process, fake], ids=["in process", "fake"])
def engine(request: pytest.FixtureRequest, may_go_on: threading.Event) -> Iterator[Engine]:
    made = request.param(may_go_on)
    yield made
    may_go_on.set()
    made.stop(drain=False, timeout=10.0)


def refusal(engine: Engine, asked: Request, sink: Sink) -> str:
    with pytest.raises(Refused) as caught:
        engine.submit(asked, sink)
    assert caught.value.detail
    return caught.value.reason


def test_a_requests_events_come_in_order_and_its_id_is_free_afterwards(engine: Engine) -> None:
    engine.start()
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


def test_requests_are_taken_from_the_start_to_the_stop(engine: Engine) -> None:
    assert engine.state == "STARTING"
    assert refusal(engine, request("early"), Listener()) == "STARTING"
    engine.start()
    assert engine.state == "SERVING"
    engine.stop(drain=True, timeout=10.0)
    assert engine.state == "STOPPED"
    assert refusal(engine, request("late"), Listener()) == "DRAINING"


def test_an_id_belongs_to_one_request_at_a_time(engine: Engine, may_go_on: threading.Event) -> None:
    engine.start()
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r"), listener)
    assert refusal(engine, request("r"), Listener()) == "DUPLICATE"
    may_go_on.set()
    assert isinstance(listener.wait()[-1], Finished)


def test_a_program_that_cannot_run_is_no_refusal(engine: Engine) -> None:
    engine.start()
    with pytest.raises(ValueError, match="at least one stage"):
        engine.submit(request("r", tokens=0), Listener())
    assert engine.load().scheduler.queued_requests == 0


def test_a_cancelled_request_is_gone_at_once(engine: Engine, may_go_on: threading.Event) -> None:
    engine.start()
    may_go_on.clear()
    listener, other = Listener(), Listener()
    engine.submit(request("r"), listener)
    assert engine.cancel("r")
    assert not engine.cancel("r"), "it is known no more"
    assert engine.load().scheduler.running_requests == 0
    engine.submit(request("r", tokens=2), other)
    may_go_on.set()
    assert isinstance(other.wait()[-1], Finished)
    assert not any(isinstance(event, Finished) for batch in listener.batches for event in batch)


def test_the_policy_is_switched_by_name(engine: Engine) -> None:
    engine.start()
    assert engine.policy == "taper"
    engine.set_policy("eager")
    assert engine.policy == "eager"
    with pytest.raises(ValueError, match="fastest"):
        engine.set_policy("fastest")
    assert engine.policy == "eager"


def test_a_drain_finishes_what_runs_and_refuses_what_comes(
    engine: Engine, may_go_on: threading.Event
) -> None:
    engine.start()
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r"), listener)
    stopping = threading.Thread(target=engine.stop, kwargs={"drain": True, "timeout": 30.0})
    stopping.start()
    while engine.state == "SERVING":
        pass
    assert engine.state == "DRAINING"
    assert refusal(engine, request("late"), Listener()) == "DRAINING"
    may_go_on.set()
    assert isinstance(listener.wait()[-1], Finished)
    stopping.join(30)
    assert engine.state == "STOPPED"


def test_a_stop_without_a_drain_tells_those_that_run(engine: Engine, may_go_on: threading.Event) -> None:
    engine.start()
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
    engine.start()
    assert engine.load().scheduler.running_requests == 0
    may_go_on.clear()
    listener = Listener()
    engine.submit(request("r"), listener)
    load = engine.load().scheduler
    assert load.running_requests + load.queued_requests == 1
    assert load.kv_capacity_tokens > 0
    may_go_on.set()
    listener.wait()
