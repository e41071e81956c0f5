"""The roster: which requests wait, run or are preempted; which one starts next, and which gives way.

    queue -> running <-> preempted

A preempted request waits again, without its pages. A request that ends leaves, wherever it is.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.draft import StepDraft
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.queue import StartQueue
from scheduler.wait import WaitModel


class Roster:
    """Every live request, in one of three places.

    queue      those that wait to start: newcomers are appended to it
    running    those that run, and may hold pages and slots; the oldest first
    preempted  those that wait to go on; the oldest first

    The wait model is told of every start, and whether requests wait.
    """

    def __init__(
        self, config: SchedulerConfig, controller: Controller, pool: PagePool, wait: WaitModel
    ) -> None:
        self.queue = StartQueue()
        self.running: list[LiveRequest] = []
        self.preempted: list[LiveRequest] = []
        self._config = config
        self._controller = controller
        self._pool = pool
        self._wait = wait
        self._first_starts = 0

    def __iter__(self) -> Iterator[LiveRequest]:
        yield from self.started
        yield from self.queue

    @property
    def started(self) -> list[LiveRequest]:
        """The requests that have left the queue, those included that wait again."""
        return [*self.running, *self.preempted]

    def count_by_client(self) -> Counter[str]:
        """How many requests of each client have left the queue."""
        return Counter(live.request.client for live in self.started)

    @property
    def num_waiting(self) -> int:
        """How many requests wait, to start or to go on."""
        return len(self.queue) + len(self.preempted)

    def leave(self, live: LiveRequest) -> None:
        """The request is no longer in any of the places."""
        self.queue.discard(live)
        for place in (self.running, self.preempted):
            if live in place:
                place.remove(live)
        if not self.num_waiting:
            self._wait.nobody_waits()

    def check(self) -> None:
        """Raise AssertionError unless the requests that run, and they alone, may hold pages and slots."""
        assert all(live.resident == (live in self.running) for live in self)
        for place in (self.running, self.preempted):
            assert place == sorted(place, key=_age), "a younger request is before an older one"

    # --- starting --------------------------------------------------------------------------------------

    def start_waiting(self, now: float) -> None:
        """Start the requests that may, one after the other; `now` is when the next step begins."""
        while self.num_waiting and (live := self._next_to_start(now)) is not None:
            self._wait.started(now)
            self.queue.start(live)
            self.leave(live)
            if live.pace.started is None:
                live.age = self._first_starts
                self._first_starts += 1
            live.resume(now)
            insort(self.running, live, key=_age)

    def _next_to_start(self, now: float) -> LiveRequest | None:
        """The first candidate that may start now, if there is one."""
        candidate = None
        for candidate in self._candidates(now):
            if self.may_start(candidate):
                return candidate
        if candidate is None:
            self._wait.nobody_waits()  # but those whose clients are at their limits
        else:
            self._wait.waits(now)
        return None

    def _candidates(self, now: float) -> Iterator[LiveRequest]:
        """Those whose turn it is: the oldest preempted request, or else the queue's next.

        Where the oldest preempted request has no room yet, others may pass it whose client has fewer requests
        beside them: preempted ones, and then the queue's next. So a client whose limits do not fit together
        holds up its own requests, and nobody is passed who has no other.
        """
        if self.preempted:
            yield self.preempted[0]
        clients = self.count_by_client()

        def beside(live: LiveRequest) -> int:
            return clients[live.request.client] - (live.pace.started is not None)

        others = self.preempted[1:]
        if (queued := self._next_of_queue(clients, now)) is not None:
            others.append(queued)
        most = beside(self.preempted[0]) if self.preempted else math.inf
        yield from (live for live in others if beside(live) < most)

    def _next_of_queue(self, clients: Counter[str], now: float) -> LiveRequest | None:
        """Those first that can still meet their TTFT target, and that their clients' limits let start.

        `clients`: how many requests of each have started.
        """
        pages = Counter[str]()  # what these may come to need
        for live in self.started:
            pages[live.request.client] += live.worst_case_pages

        def is_within(live: LiveRequest) -> bool:
            client = live.request.client
            few = clients[client] < self._config.max_client_running
            return few and pages[client] + live.worst_case_pages <= self._config.max_client_pages

        turn = self._controller.LATE_TURN
        return self.queue.next(
            clients,
            is_within,
            partial(self._can_make_it, start=now),
            missed_first=self._first_starts % turn == turn - 1,
        )

    def may_start(self, live: LiveRequest, before: Sequence[LiveRequest] = ()) -> bool:
        """Whether the step with it stays within everybody's target, and its worst case fits now.

        What running requests have still to read is theirs already, and a share of their worst case; those in
        `before` start first. Whoever would be alone may always start.
        """
        running = [*self.running, *before]
        if not running:
            return True
        if len(running) >= self._controller.latency.buckets.largest:
            return False
        if not self._controller.may_start(live, running):
            return False
        reserved = sum(other.reserved_pages(self._config.reserve) for other in self.running)
        reserved += sum(other.worst_case_pages for other in before)
        return live.worst_case_pages <= self._pool.available - reserved

    # --- being late ------------------------------------------------------------------------------------

    def late(self, now: float) -> list[LiveRequest]:
        """The requests that wait, would rather go elsewhere than be late, and will be.

        One that has been preempted waits for its first token again, if it has none.
        """
        waiting = [*self.queue] if self.queue.picky else []
        waiting += [live for live in self.preempted if live.pace.first_token is None]
        return [live for live in waiting if live.request.slo.reject and not self._can_make_it(live, now)]

    def _can_make_it(self, live: LiveRequest, start: float) -> bool:
        """Whether its first token can come in time if it starts at `start`.

        Twice the mean time of reading is provided for, but half of the target at most: what is known of
        reading is learned from those that start.
        """
        reading = min(2 * self._wait.reading(len(live.request.prompt)), live.request.slo.ttft / 2)
        return live.pace.ttft_deadline > start + reading

    # --- giving way ------------------------------------------------------------------------------------

    def make_room(self, draft: StepDraft, live: LiveRequest, pages: int) -> bool:
        """Preempt requests younger than `live` that the draft does not advance, until `pages` are available.

        The youngest goes first: the tails of its branches whose turn is not next, then all of it.
        """
        pool = self._pool
        for victim in reversed(self.running):
            if pool.available >= pages or victim.age <= live.age:
                break
            if victim in draft.advanced or not victim.holds_pages:
                continue
            for branch in victim.runnable()[1:]:
                if pool.available < pages:
                    victim.drop_tail(branch)
            if pool.available < pages:
                victim.preempt()
                self.running.remove(victim)
                insort(self.preempted, victim, key=_age)
        return pool.available >= pages


def _age(live: LiveRequest) -> int:
    return live.age
