"""The engine as the server sees it, against what its process says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from scheduler.events import TokenEmitted
from scheduler.step import Sample
from serve.config import ServerConfig
from serve.door import Failed, News, StepRecord
from serve.rate import TokenRate
from serve.remote.channel import Channel
from serve.remote.engine import RemoteEngine
from serve.remote.messages import Begin, Broken, Cancel, Happened, SetPolicy, Stop, Submit, Up
from serve.remote.rows import pack
from serve.served import Platform
from tests.serve.fakes import STEP, begin, finished, say
from tests.serve.remote.sides import LOAD, MODEL, OtherSide, request
from tests.serve.waiting import Listener, until


@dataclass
class Front:
    engine: RemoteEngine
    other: OtherSide
    steps: list[StepRecord]
    killed: list[str]

    def happened(self, *told: tuple[int, list[News]], failed: str = "") -> None:
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
    assert "it was killed, or it crashed" in front.engine.failure


def test_an_engine_that_dies_is_told_of_by_its_process(front: Front) -> None:
    listener = Noting(front.engine)
    front.engine.submit(request("r"), listener)
    front.happened((0, [Failed("RuntimeError()")]), failed="the device is gone")
    assert listener.wait() == [Failed("RuntimeError()")]
    front.other.channel.close()
    until(lambda: front.other.gone.is_set())
    assert front.engine.failure == "the device is gone"
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
    assert ("no step ended in 0.4 seconds" in engine.failure) == killed
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
