"""A channel keeps messages whole and in order, waits for nobody, and tells when the other side is gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from serve.remote.channel import Channel
from serve.remote.messages import Broken, Message
from tests.serve.waiting import until


@dataclass
class End:
    """One end of a pair, in `serve` in a thread of its own once it is started."""

    channel: Channel
    heard: list[str] = field(default_factory=list)
    caught_up: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    started: bool = False

    def start(self) -> None:
        self.started = True
        threading.Thread(target=self._serve).start()

    def _serve(self) -> None:
        self.channel.serve(self.hear, self.caught_up.set)
        self.gone.set()

    def hear(self, message: Message) -> None:
        assert isinstance(message, Broken)
        self.heard.append(message.text)

    def say(self, *texts: str) -> None:
        for text in texts:
            self.channel.send(Broken("", text))

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.heard) >= count, 20)


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    made = tuple(End(Channel(end)) for end in socket.socketpair())
    yield made  # type: ignore[misc]
    for end in made:
        end.channel.close()
        if end.started:
            assert end.gone.wait(10)
        else:
            end.channel.serve(end.hear)


SIZES = [0, 1, 7, 100_000, 3_000_000, 5, 262_136, 262_144, 2]


def test_messages_of_any_size_come_whole_and_in_order(ends: tuple[End, End]) -> None:
    near, far = ends
    near.start()
    far.start()
    texts = [str(size % 10) * size for size in SIZES]
    near.say(*texts)
    far.say("meanwhile")
    far.wait_for(len(texts))
    near.wait_for(1)
    assert (far.heard, near.heard) == (texts, ["meanwhile"])
    near.channel.close()
    assert near.gone.wait(10)
    assert far.gone.wait(10)


def test_whoever_sends_does_not_wait_and_hears_when_the_other_has_caught_up(ends: tuple[End, End]) -> None:
    near, far = ends
    near.start()
    texts = [f"{number}" * 1000 for number in range(2000)]
    near.say(*texts)  # megabytes that nobody reads yet
    assert near.channel.is_behind
    assert not near.caught_up.is_set()
    far.start()
    far.wait_for(len(texts))
    assert far.heard == texts
    assert near.caught_up.wait(10)
    assert not near.channel.is_behind


def test_whoever_was_behind_is_always_told_when_it_has_caught_up(ends: tuple[End, End]) -> None:
    """However soon that is: what was kept back meanwhile is sent by nobody else."""
    near, far = ends
    near.start()
    far.start()
    for _ in range(300):
        near.caught_up.clear()
        near.say("x" * 400_000)
        if near.channel.is_behind:
            assert near.caught_up.wait(10)
    far.wait_for(300)
    near.channel.send(Broken("", "small"))
    assert not near.channel.is_behind, "whoever takes everything at once leaves nobody behind"


def test_who_catches_up_in_the_turn_in_which_it_fell_behind_is_noticed_too(ends: tuple[End, End]) -> None:
    near, far = ends

    def answer(message: Message) -> None:
        near.say("x" * 300_000)  # more than the socket takes, and less than twice that
        assert near.channel.is_behind
        far.channel.receive(far.hear)
        near.hear(message)

    def serve() -> None:
        near.channel.serve(answer, near.caught_up.set)
        near.gone.set()

    near.started = True
    threading.Thread(target=serve).start()
    far.say("say something")
    near.wait_for(1)
    assert near.caught_up.wait(10), "what was held back until then would wait for ever"


def test_every_threads_messages_keep_their_order(ends: tuple[End, End]) -> None:
    near, far = ends
    near.start()
    far.start()
    threads = [
        threading.Thread(target=near.say, args=[f"{name}{number:04}" for number in range(300)])
        for name in "abc"
    ]
    for thread in threads:
        thread.start()
    far.wait_for(900)
    for name in "abc":
        said = [text for text in far.heard if text[0] == name]
        assert said == sorted(said)
        assert len(said) == 300


def test_what_has_arrived_can_be_taken_at_once_beside_the_thread_that_serves(ends: tuple[End, End]) -> None:
    near, far = ends
    near.say("a", "b")
    far.channel.receive(far.hear)
    assert far.heard == ["a", "b"]
    far.channel.receive(far.hear)  # nothing has come: it does not wait
    far.start()
    near.say(*"cdefgh")
    for _ in range(100):
        far.channel.receive(far.hear)
    far.wait_for(8)
    assert "".join(far.heard) == "abcdefgh"


def test_the_end_is_noticed_after_the_last_words(ends: tuple[End, End]) -> None:
    near, far = ends
    far.say("farewell")
    far.channel.close()
    near.start()
    assert near.gone.wait(10)
    assert near.heard == ["farewell"]
    near.say("is anybody there?")  # nobody is told, and nothing breaks
    with pytest.raises(EOFError):
        near.channel.receive(near.hear)


def test_a_close_lets_the_other_side_take_what_waits(ends: tuple[End, End]) -> None:
    near, far = ends
    text = "x" * 5_000_000
    near.say(text)
    assert near.channel.is_behind
    far.start()
    near.channel.close(timeout=10)
    assert far.gone.wait(10)
    assert far.heard == [text]


def test_a_close_does_not_wait_longer_than_it_may(ends: tuple[End, End]) -> None:
    near, far = ends
    near.say("x" * 5_000_000)
    began = time.monotonic()
    near.channel.close(timeout=0.05)
    assert time.monotonic() - began < 5
    far.start()
    assert far.gone.wait(10), "it hears of the end nevertheless"
    assert not far.heard
