"""The two ends of the engine's process, each against the other's messages."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from model.config import PRESETS
from scheduler.events import Event, Finished, TokenEmitted
from scheduler.predictor import PredictionAccuracy
from scheduler.program import Plan, SerialStage
from scheduler.request import Request
from scheduler.scheduler import SchedulerLoad
from scheduler.step import Sample
from scheduler.stopping import Stopping
from serve.config import ServerConfig
from serve.door import Failed, Load, News, State, StepRecord, Watcher
from serve.rate import TokenRate
from serve.remote.channel import Channel
from serve.remote.child import EngineHost, Started
from serve.remote.engine import RemoteEngine
from serve.remote.messages import Begin, Broken, Cancel, Happened, Message, SetPolicy, Stop, Submit, Up
from serve.remote.rows import Rows, pack, unpack
from serve.served import Platform
from tests.serve.fakes import FakeEngine, begin, finished, say
from tests.serve.server.test_metrics import STEP
from tests.serve.test_door import Listener

MODEL = PRESETS["qwen3-0.6b"]
LOAD = Load(SchedulerLoad(1, 2, 3, 4, 5), PredictionAccuracy(), output_tokens_per_second=99.0, steps=7)


def request(id: str) -> Request:
    return Request(id=id, prompt=(1,), program=Plan(stages=(SerialStage(stopping=Stopping(max_tokens=5)),)))


@dataclass
class OtherSide:
    """What a test says and hears in the place of a process."""

    channel: Channel
    heard: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    gone: threading.Event = field(default_factory=threading.Event)

    def listen(self) -> None:
        def serve() -> None:
            self.channel.serve(self.heard.put)
            self.gone.set()

        threading.Thread(target=serve).start()

    def next(self, kind: type[Message]) -> Message:  # type: ignore[valid-type]
        message = self.heard.get(timeout=10)
        assert isinstance(message, kind), message
        return message


@pytest.fixture
def ends() -> tuple[Channel, OtherSide]:
    ours, theirs = map(Channel, socket.socketpair())
    return ours, OtherSide(theirs)


# --- the server's side -------------------------------------------------------------------------------------


@dataclass
class Front:
    engine: RemoteEngine
    other: OtherSide
    steps: list[StepRecord]
    killed: list[str]

    def happened(self, *told: tuple[int, list[News]], failed: bool = False) -> None:
        self.other.channel.send(Happened(*pack(told), steps=(STEP,), load=LOAD, failed=failed))


@pytest.fixture
def front(ends: tuple[Channel, OtherSide]) -> Iterator[Front]:
    ours, other = ends
    steps, killed, now = list[StepRecord](), list[str](), [100.0]

    def kill() -> None:
        killed.append("killed")
        other.channel.close()

    engine = RemoteEngine(ours, steps.append, kill, clock=lambda: now[0])
    other.listen()
    engine.begin(ServerConfig(policy="eager"))
    assert other.next(Begin) == Begin(ServerConfig(policy="eager"))
    other.channel.send(Up(MODEL, Platform(), "eager", LOAD))
    assert engine.up().model == MODEL
    yield Front(engine, other, steps, killed)
    other.channel.close()
    assert other.gone.wait(10)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def test_what_is_asked_for_crosses_in_order(front: Front) -> None:
    front.engine.submit(request("r"), Listener())
    front.engine.cancel("r")
    front.engine.cancel("unknown")
    front.engine.submit(request("r"), Listener())
    front.engine.set_policy("off")
    asked = [front.other.heard.get(timeout=10) for _ in range(4)]
    assert asked == [Submit(0, request("r")), Cancel(0), Submit(1, request("r")), SetPolicy("off")]
    assert front.engine.policy == "off"


def test_who_has_an_id_again_hears_of_its_own_tokens_alone(front: Front) -> None:
    forgotten, listener = Listener(), Listener()
    front.engine.submit(request("r"), forgotten)
    front.engine.cancel("r")
    front.engine.submit(request("r"), listener)
    front.happened((0, say("r", 0, "old")), (1, [*say("r", 0, "n"), finished("r")]))
    news = listener.wait()
    assert [piece.sample.token for piece in news if isinstance(piece, TokenEmitted)] == [ord("n")]
    assert not forgotten.batches
    front.happened((1, say("r", 0, "late")))  # after its end
    until(lambda: len(front.steps) == 2)
    assert len(listener.batches) == 1


def test_steps_are_told_of_after_their_news_and_tokens_are_counted(front: Front) -> None:
    listener = Listener()
    front.engine.submit(request("r"), listener)
    front.happened((0, [begin("r", 0), *(TokenEmitted("r", 0, Sample(n), n) for n in range(10))]))
    until(lambda: bool(front.steps))
    assert front.steps == [STEP]
    assert len(listener.batches) == 1
    load = front.engine.load()
    assert load.output_tokens_per_second == 10 / TokenRate.WINDOW, "by this side's clock"
    assert (load.scheduler, load.steps) == (LOAD.scheduler, LOAD.steps)


class Noting(Listener):
    """Remembers the engine's state whenever it hears of something."""

    def __init__(self, engine: RemoteEngine) -> None:
        super().__init__()
        self.states: list[str] = []
        self._engine = engine

    def __call__(self, news: Sequence[News]) -> None:
        self.states.append(self._engine.state)
        super().__call__(news)


def test_a_process_that_ends_by_itself_has_failed(front: Front) -> None:
    listener = Noting(front.engine)
    front.engine.submit(request("r"), listener)
    front.other.channel.close()
    (failed,) = listener.wait()
    assert isinstance(failed, Failed)
    assert listener.states == ["FAILED"], "it is known before anybody is told"
    late = Listener()
    front.engine.submit(request("late"), late)
    assert late.wait()
    front.engine.stop(drain=True, timeout=5.0)
    assert (front.engine.state, front.killed) == ("FAILED", [])


def test_an_engine_that_dies_is_told_of_by_its_process(front: Front) -> None:
    listener = Noting(front.engine)
    front.engine.submit(request("r"), listener)
    front.happened((0, [Failed("the device is gone")]), failed=True)
    assert listener.wait() == [Failed("the device is gone")]
    assert listener.states == ["FAILED"], "it is known before anybody is told"


def test_a_process_that_is_killed_while_it_drains_has_failed_those_that_ran(front: Front) -> None:
    listener = Listener()
    front.engine.submit(request("r"), listener)
    stopping = threading.Thread(target=front.engine.stop, kwargs={"drain": True, "timeout": 20.0})
    stopping.start()
    front.other.next(Submit)
    assert front.other.next(Stop) == Stop(True, 20.0)
    assert front.engine.state == "DRAINING"
    front.other.channel.close()
    stopping.join(10)
    assert isinstance(listener.wait()[-1], Failed)
    assert front.engine.state == "FAILED"


def test_a_bug_in_what_hears_of_the_engine_is_a_failure_and_hangs_nobody(
    ends: tuple[Channel, OtherSide],
) -> None:
    ours, other = ends
    killed = threading.Event()

    def watch(step: StepRecord) -> None:
        raise KeyError("a bug")

    engine = RemoteEngine(ours, watch, killed.set)
    other.listen()
    engine.begin(ServerConfig())
    other.channel.send(Up(MODEL, Platform(), "eager", LOAD))
    engine.up()
    listener = Listener()
    engine.submit(request("r"), listener)
    other.channel.send(Happened(*pack([]), steps=(STEP,), load=LOAD))
    assert isinstance(listener.wait()[-1], Failed)
    assert engine.state == "FAILED"
    assert killed.is_set()
    assert other.gone.wait(10), "nobody hears it any more"
    engine.stop(drain=True, timeout=5.0)


def test_a_stop_is_an_end_and_no_failure(front: Front) -> None:
    stopping = threading.Thread(target=front.engine.stop, kwargs={"drain": False, "timeout": 5.0})
    stopping.start()
    front.other.next(Stop)
    front.other.channel.close()
    stopping.join(10)
    assert (front.engine.state, front.killed) == ("STOPPED", [])


@pytest.mark.parametrize(
    ("asked", "steps", "killed"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_an_engine_is_given_up_when_requests_run_and_no_step_ends(
    ends: tuple[Channel, OtherSide], asked: bool, steps: bool, killed: bool
) -> None:
    ours, other = ends
    dead = threading.Event()
    engine = RemoteEngine(ours, lambda step: None, dead.set, patience=0.4)
    other.listen()
    engine.begin(ServerConfig())
    other.channel.send(Up(MODEL, Platform(), "taper", LOAD))
    engine.up()
    if asked:
        engine.submit(request("r"), Listener())
    until_then = time.monotonic() + 1.5
    while time.monotonic() < until_then and not dead.wait(0.05):
        if steps:
            other.channel.send(Happened(*pack([]), steps=(STEP,), load=LOAD))
    assert dead.is_set() == killed
    other.channel.close()
    assert other.gone.wait(10)


def test_a_drain_that_is_cut_short_is_a_stop_from_then_on(front: Front) -> None:
    def stop(drain: bool) -> None:
        threading.Thread(target=front.engine.stop, kwargs={"drain": drain, "timeout": 20.0}).start()

    stop(True)
    assert front.other.next(Stop) == Stop(True, 20.0)
    assert front.engine.state == "DRAINING"
    stop(False)
    assert front.other.next(Stop) == Stop(False, 20.0)
    assert front.engine.state == "STOPPED"


def test_a_process_that_drains_has_all_the_time_of_its_drain(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.remote.engine.GRACE", 0.01)
    stopping = threading.Thread(target=front.engine.stop, kwargs={"drain": True, "timeout": 20.0})
    stopping.start()
    front.other.next(Stop)
    stopping.join(0.3)
    assert not front.killed
    front.other.channel.close()
    stopping.join(10)
    assert (front.engine.state, front.killed) == ("STOPPED", [])


def test_a_process_that_does_not_end_is_killed(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        def error(self, text: str) -> None:
            assert front.killed, "it is said when it has been done: to say it may fail"

    monkeypatch.setattr("serve.remote.engine.GRACE", 0.01)
    monkeypatch.setattr("serve.remote.engine.log", Log())
    front.engine.stop(drain=True, timeout=0.01)
    assert front.killed == ["killed"]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (Broken("ValueError", "no such model"), ValueError),
        (Broken("OSError", "no such folder"), OSError),
        (Broken("MemoryError", "3 TiB"), MemoryError),
        (Broken("", "a bug"), RuntimeError),
        (None, RuntimeError),
    ],
)
def test_what_kept_it_from_starting_is_raised_here(
    ends: tuple[Channel, OtherSide], said: Broken | None, error: type[Exception]
) -> None:
    ours, other = ends
    engine = RemoteEngine(ours, lambda step: None, lambda: None)
    other.listen()
    engine.begin(ServerConfig())
    if said is not None:
        other.channel.send(said)
    other.channel.close()
    with pytest.raises(error, match=said.text if said else "before it was ready"):
        engine.up()
    assert other.gone.wait(10)


# --- the engine's side -------------------------------------------------------------------------------------


class Fake(FakeEngine):
    """Runs until it is stopped, or dies."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()
        self._telling = threading.Lock()

    def tell(self, request_id: str, *happened: Event | Failed) -> None:
        with self._telling:
            super().tell(request_id, *happened)

    def stop(self, *, drain: bool, timeout: float) -> None:
        super().stop(drain=drain, timeout=timeout)
        self.over.set()

    def die(self) -> None:
        self.state = "FAILED"
        self.over.set()

    def wait(self) -> None:
        self.over.wait(10)
        with self._telling:  # everybody has been told
            pass


@dataclass
class Back:
    engine: Fake
    other: OtherSide
    gone: threading.Event = field(default_factory=threading.Event)
    status: list[int] = field(default_factory=list)
    watch: list[Watcher] = field(default_factory=list)
    before_plan: list[Callable[[], None]] = field(default_factory=list)

    def news(self, names: dict[int, str]) -> dict[int, list[News]]:
        """Of the next message that has some."""
        while True:
            message = self.other.next(Happened)
            assert isinstance(message, Happened)
            if message.tokens:
                return unpack(Rows(message.tokens, message.rare), names)


@pytest.fixture
def back(ends: tuple[Channel, OtherSide]) -> Iterator[Back]:
    theirs, other = ends
    made = Back(Fake(), other)

    def start(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None]) -> Started:
        assert config.policy == "eager"
        made.watch.append(watch)
        made.before_plan.append(before_plan)
        return Started(made.engine, MODEL, Platform(device="fake"))

    host = EngineHost(theirs, start, made.gone.set)
    running = threading.Thread(target=lambda: made.status.append(host.run()))
    running.start()
    other.listen()
    other.channel.send(Begin(ServerConfig(policy="eager")))
    up = other.next(Up)
    assert (up.model, up.platform.device, up.policy) == (MODEL, "fake", "taper")  # type: ignore[union-attr]
    yield made
    if not made.engine.over.is_set():
        made.engine.stop(drain=False, timeout=1.0)
    running.join(20)
    assert other.gone.wait(10)


def test_requests_and_cancels_reach_the_engine_and_news_come_back(back: Back) -> None:
    back.other.channel.send(Submit(7, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    back.engine.tell("r", *say("r", 0, "a"))
    back.watch[0](STEP)
    assert len(back.news({7: "r"})[7]) == 1
    back.other.channel.send(Cancel(7))
    back.engine.wait_for(lambda engine: engine.cancelled == ["r"])
    back.other.channel.send(Cancel(7))
    back.other.channel.send(SetPolicy("off"))
    until(lambda: back.engine.policy == "off")
    assert back.engine.cancelled == ["r"], "a handle is cancelled once"


def test_a_cancel_of_what_has_ended_does_not_touch_the_next_request_of_its_name(back: Back) -> None:
    back.other.channel.send(Submit(0, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    back.engine.tell("r", finished("r"))
    back.watch[0](STEP)
    assert isinstance(back.news({0: "r"})[0][-1], Finished)
    del back.engine.requests["r"]
    back.other.channel.send(Submit(1, request("r")))
    back.other.channel.send(Cancel(0))
    back.other.channel.send(SetPolicy("off"))
    until(lambda: back.engine.policy == "off")
    assert "r" in back.engine.requests
    assert not back.engine.cancelled


def test_a_refusal_does_not_wait_for_a_step(back: Back) -> None:
    back.engine.state = "DRAINING"
    back.other.channel.send(Submit(3, request("r")))
    (refused,) = back.news({3: "r"})[3]
    assert refused.reason == "DRAINING"  # type: ignore[union-attr]


def test_what_has_arrived_counts_before_the_next_plan(back: Back) -> None:
    back.other.channel.send(Submit(0, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    back.other.channel.send(Cancel(0))
    back.before_plan[0]()
    assert back.engine.cancelled == ["r"], "now, and not when a thread comes to it"


def test_what_does_not_fit_is_told_with_what_follows(back: Back, monkeypatch: pytest.MonkeyPatch) -> None:
    back.other.channel.send(Submit(0, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    with monkeypatch.context() as patched:
        patched.setattr(Channel, "is_behind", property(lambda channel: True))
        for count in (1, 2):
            back.engine.tell("r", *say("r", 0, "a", count))
            back.watch[0](STEP)
    back.engine.tell("r", *say("r", 0, "a", 3))
    back.watch[0](STEP)
    while not (message := back.other.next(Happened)).tokens:  # type: ignore[union-attr]
        pass
    assert isinstance(message, Happened)
    (news,) = unpack(Rows(message.tokens, message.rare), {0: "r"}).values()
    assert [piece.completion_tokens for piece in news] == [1, 2, 3]  # type: ignore[union-attr]
    assert len(message.steps) == 3


def test_a_stop_drains_and_the_process_ends_well(back: Back) -> None:
    back.other.channel.send(Submit(0, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    back.other.channel.send(Stop(True, 10.0))
    assert back.engine.drained.wait(10)
    assert not back.status, "somebody runs"
    back.engine.tell("r", finished("r"))
    assert isinstance(back.news({0: "r"})[0][-1], Finished)
    until(lambda: back.status == [0])
    assert not back.gone.is_set(), "it left, it was not left alone"


def test_the_last_news_are_told_however_far_the_server_is_behind(
    back: Back, monkeypatch: pytest.MonkeyPatch
) -> None:
    back.other.channel.send(Submit(0, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    monkeypatch.setattr(Channel, "is_behind", property(lambda channel: True))
    back.engine.tell("r", finished("r"))
    back.watch[0](STEP)
    back.other.channel.send(Stop(True, 10.0))
    assert isinstance(back.news({0: "r"})[0][-1], Finished)
    until(lambda: back.status == [0])


def test_a_bug_that_one_request_meets_is_told_to_its_caller_alone(
    back: Back, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise KeyError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(back.engine, "submit", submit)
        back.other.channel.send(Submit(0, request("r")))
        assert back.news({0: "r"})[0] == [Failed("KeyError('a bug')")]
    back.other.channel.send(Submit(1, request("s")))
    back.engine.wait_for(lambda engine: "s" in engine.requests)
    assert not back.gone.is_set()


def test_an_engine_that_can_hear_the_server_no_more_ends(back: Back, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_policy(policy: str) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(back.engine, "set_policy", set_policy)
    back.other.channel.send(SetPolicy("off"))
    assert back.gone.wait(10)
    back.other.channel.close()


def test_a_second_stop_cuts_the_first_short(back: Back) -> None:
    back.other.channel.send(Submit(0, request("r")))
    back.engine.wait_for(lambda engine: "r" in engine.requests)
    back.other.channel.send(Stop(True, 60.0))
    assert back.engine.drained.wait(10)
    back.other.channel.send(Stop(False, 0.0))
    assert isinstance(back.news({0: "r"})[0][-1], Failed)
    until(lambda: back.status == [0])


def test_a_dead_engine_ends_its_process_with_an_error(back: Back) -> None:
    back.engine.die()
    until(lambda: back.status == [1])
    messages = [back.other.heard.get(timeout=10)]
    assert isinstance(messages[-1], Happened)
    assert messages[-1].failed


@pytest.mark.parametrize("state", ["SERVING", "DRAINING"])
def test_a_process_whose_server_is_gone_ends(back: Back, state: State) -> None:
    back.engine.state = state
    back.other.channel.close()
    assert back.gone.wait(10)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError("no model"), Broken("OSError", "no model")),
        (ValueError("no such policy"), Broken("ValueError", "no such policy")),
        (RuntimeError("RESOURCE_EXHAUSTED:\n 3 TiB"), Broken("MemoryError", "RESOURCE_EXHAUSTED: 3 TiB")),
        (MemoryError(), Broken("MemoryError", "MemoryError")),
        (KeyError("a bug"), Broken("", "KeyError('a bug')")),
    ],
)
def test_why_an_engine_did_not_start_is_told(
    ends: tuple[Channel, OtherSide], error: Exception, said: Broken
) -> None:
    theirs, other = ends

    def start(*_: object) -> Started:
        raise error

    host = EngineHost(theirs, start, lambda: None)
    other.listen()
    other.channel.send(Begin(ServerConfig()))
    assert host.run() == 1
    assert other.next(Broken) == said
    assert other.gone.wait(10)
