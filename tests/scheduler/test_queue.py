"""The queue: who is next, by client, by target and by arrival."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from scheduler.live_request import LiveRequest
from scheduler.queue import StartQueue
from scheduler.request import Slo
from tests.scheduler.strategies import examples


@dataclass(frozen=True)
class Asked:
    client: str
    slo: Slo = Slo()  # noqa: RUF009 - frozen


@dataclass(eq=False)
class Waiting:
    """As much of a live request as the queue looks at; whether it can still meet its target."""

    request: Asked
    on_time: bool = True


def waiting(client: str = "", *, on_time: bool = True) -> LiveRequest:
    return Waiting(Asked(client), on_time)  # type: ignore[return-value]


def can_make_it(live: LiveRequest) -> bool:
    return live.on_time  # type: ignore[attr-defined]


def following(
    queue: StartQueue, running: Mapping[str, int] = {}, most: float = math.inf, *, missed_first: bool = False
) -> LiveRequest | None:
    return queue.next(
        running,
        lambda live: running.get(live.request.client, 0) < most,
        can_make_it,
        missed_first=missed_first,
    )


def test_of_one_client_the_oldest_is_next() -> None:
    queue, lives = StartQueue(), [waiting() for _ in range(3)]
    for live in lives:
        queue.append(live)
    assert [*queue] == lives
    for live in lives:
        assert following(queue) is live
        queue.discard(live)
    assert following(queue) is None
    assert len(queue) == 0


def test_the_client_with_the_fewest_running_is_next() -> None:
    queue = StartQueue()
    flood = [waiting("flood") for _ in range(9)]
    for live in flood:
        queue.append(live)
    quiet = waiting("quiet")
    queue.append(quiet)
    assert following(queue, {"flood": 1}) is quiet
    assert following(queue, {"flood": 1, "quiet": 1}) is flood[0], "of equals, who came first"
    assert following(queue, {"quiet": 2}) is flood[0]
    queue.start(flood[0])
    assert following(queue) is quiet, "the other has just had its turn"


def test_a_client_at_its_limit_is_passed_over() -> None:
    queue, limited, other = StartQueue(), waiting("limited"), waiting("other")
    queue.append(limited)
    assert following(queue, {"limited": 2}, 2) is None
    queue.append(other)
    assert following(queue, {"limited": 2, "other": 1}, 2) is other
    assert following(queue, {"limited": 1, "other": 1}, 2) is limited


def test_who_has_missed_the_target_is_next_after_the_others_or_first_when_told_so() -> None:
    queue, late, on_time = StartQueue(), waiting(on_time=False), waiting()
    queue.append(late)
    queue.append(on_time)
    assert following(queue) is on_time
    assert following(queue, missed_first=True) is late
    queue.discard(on_time)
    assert following(queue) is late
    queue.discard(late)
    assert following(queue) is None


def test_how_many_are_ahead_where_clients_take_turns() -> None:
    queue = StartQueue()
    for client, count in (("a", 5), ("b", 1)):
        for _ in range(count):
            queue.append(waiting(client))

    def ahead(running: Mapping[str, int] = {}, most: float = math.inf) -> dict[str, int]:
        return {client: len(queue.ahead_of(client, running, most)) for client in "abc"}

    assert ahead() == {"a": 6, "b": 3, "c": 2}
    assert ahead({"a": 1}) == {"a": 6, "b": 2, "c": 1}
    assert ahead({"a": 1}, most=1) == {"a": 1, "b": 1, "c": 1}, "what a client may not run is not ahead"
    assert {client: queue.waiting_of(client) for client in "abc"} == {"a": 5, "b": 1, "c": 0}


@given(st.lists(st.sampled_from("abc")), st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)))
def test_those_ahead_are_those_that_start_before_up_to_one_of_each_client(
    clients: list[str], running: dict[str, int]
) -> None:
    queue = StartQueue()
    for client in clients:
        queue.append(waiting(client))
    counted = len(queue.ahead_of("a", running, math.inf))
    newest = waiting("a")
    queue.append(newest)
    runs = Counter(running)
    before = 0
    while (live := following(queue, runs)) is not newest:
        assert live is not None
        queue.start(live)
        runs[live.request.client] += 1
        before += 1
    assert before <= counted <= before + 2


@dataclass
class Naive:
    """The same, by looking at everybody."""

    lives: list[LiveRequest] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)  # the clients that have had one, the latest last
    missed: set[LiveRequest] = field(default_factory=set)

    def _of(self, client: str) -> list[LiveRequest]:
        return [live for live in self.lives if live.request.client == client]

    def next(self, running: Mapping[str, int], most: float, missed_first: bool) -> LiveRequest | None:
        for client in {live.request.client for live in self.lives}:
            line = [live for live in self._of(client) if live not in self.missed]
            while line and not can_make_it(line[0]):
                self.missed.add(line.pop(0))
        startable = [live for live in self.lives if running.get(live.request.client, 0) < most]
        late = [live for live in startable if live in self.missed]
        timely = [live for live in startable if live not in self.missed]
        chosen = (late or timely) if missed_first else (timely or late)

        def turn(live: LiveRequest) -> tuple[int, int]:
            client = live.request.client
            last = max((n + 1 for n, each in enumerate(self.turns) if each == client), default=0)
            return running.get(client, 0), last

        return min(chosen, key=turn, default=None)

    def start(self, live: LiveRequest) -> None:
        self.turns.append(live.request.client)
        self.remove(live)

    def remove(self, live: LiveRequest) -> None:
        if live in self.lives:
            self.lives.remove(live)
        client = live.request.client
        if all(other.request.client != client for other in self.lives):  # a newcomer when it comes back
            self.turns = [each if each != client else "" for each in self.turns]


@examples(60)
@given(st.data())
def test_it_answers_as_if_everybody_were_looked_at(data: st.DataObject) -> None:
    queue, naive, running = StartQueue(), Naive(), dict.fromkeys("abc", 0)
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["come", "come", "start", "restart", "leave", "late"])):
            case "come":
                live = waiting(data.draw(st.sampled_from("abc")))
                queue.append(live)
                naive.lives.append(live)
            case "start":
                missed_first, most = data.draw(st.booleans()), data.draw(st.integers(1, 5))
                live = following(queue, running, most, missed_first=missed_first)
                assert live is naive.next(running, most, missed_first)
                if live is not None:
                    queue.start(live)
                    naive.start(live)
                    running[live.request.client] += 1
            case "restart":  # of a request that has waited elsewhere, since it was preempted
                live = waiting(data.draw(st.sampled_from("abc")))
                queue.start(live)
                naive.start(live)
            case "leave" if naive.lives:
                live = data.draw(st.sampled_from(naive.lives))
                naive.remove(live)
                queue.discard(live)
                queue.discard(live)  # once more changes nothing
            case "late" if naive.lives:
                live = data.draw(st.sampled_from(naive.lives))
                live.on_time = False  # type: ignore[attr-defined]
            case _:
                running[data.draw(st.sampled_from("abc"))] = 0
        assert [*queue] == naive.lives
        assert len(queue) == len(naive.lives)
