"""The engine's process, against what the server says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from scheduler.events import Event, Finished
from serve.config import ServerConfig
from serve.door import Failed, News, State, Watcher
from serve.remote.channel import Channel
from serve.remote.child import EngineHost, Started
from serve.remote.messages import Begin, Broken, Cancel, Happened, SetPolicy, Stop, Submit, Up
from serve.remote.rows import Rows, unpack
from serve.served import Platform
from tests.serve.fakes import STEP, FakeEngine, finished, say
from tests.serve.remote.sides import MODEL, OtherSide, request
from tests.serve.waiting import until


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
        self.state, self.failure = "FAILED", "the device is gone"
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
        assert back.news({0: "r"})[0] == [Failed("KeyError: 'a bug'")]
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
    assert messages[-1].failed == "the device is gone"


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
