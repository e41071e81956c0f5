"""The scheduler: which tokens the next step computes.

    schedule(now) -> ScheduledStep  decides, takes pages, advances what is *computed*
    update(result, now) -> [Event]  learns the sampled tokens, forks, joins and finishes

One step may be in flight while the next is planned. There are no phases: a prompt being read, a seed, a
replay after a preemption and a decoding branch are all segments with tokens that are not computed yet.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scheduler.branch import Branch
from scheduler.controller import Controller, Turn
from scheduler.cursor import Codec
from scheduler.draft import StepDraft
from scheduler.events import Event
from scheduler.flight import Flight
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.program import check_program, longest_first_prefix
from scheduler.queue import StartQueue
from scheduler.request import Request
from scheduler.step import ScheduledStep, StepResult
from scheduler.wait import WaitModel

Rejection = Literal["QUEUE_FULL", "CLIENT_LIMIT", "KV_FULL", "SLO_UNATTAINABLE", "DUPLICATE"]


class RejectedError(Exception):
    """A request that cannot be queued; `retry_after`, seconds until it could be, if that is known."""

    def __init__(self, reason: Rejection, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.reason: Rejection = reason
        self.retry_after = retry_after


RESERVE = 0.1  # of what running requests may still need: see SchedulerConfig.reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes, and the rules of starting.

    num_pages, page_size  the KV pool
    num_slots             branches that can keep device state at once; at least twice the largest bucket
    max_context           positions that a branch may fill
    max_queue             requests that may wait
    max_client_queue      of one client
    max_client_running    requests of one client that may run at once
    max_client_kv         share of the pages that the worst cases of those may come to
    reserve               share of the pages by which running requests may still grow that a new one leaves
                          to them
    prefix_cache          keep full prompt pages for later requests
    """

    num_pages: int
    page_size: int
    num_slots: int
    max_context: int
    max_queue: int = 1024
    max_client_queue: float = math.inf
    max_client_running: float = math.inf
    max_client_kv: float = math.inf
    reserve: float = RESERVE
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """Requests that run and wait, their branches, and the KV positions of the pages that are owned."""

    running_requests: int
    running_branches: int
    queued_requests: int
    kv_used_tokens: int
    kv_capacity_tokens: int


class Scheduler:
    """Requests in, steps out; holds every page and slot. Not thread-safe; has no clock.

    A request waits (`_queue`), runs (`_running`), perhaps waits again without its pages (`_preempted`), and
    is gone.
    """

    def __init__(self, config: SchedulerConfig, controller: Controller, codec: Codec) -> None:
        largest = controller.latency.buckets.largest
        if config.num_slots < 2 * largest:
            raise ValueError(f"{config.num_slots} slots are fewer than twice the largest bucket's rows")
        self.config = config
        self.controller = controller
        self.pool = PagePool(config.num_pages, config.page_size)
        self._codec = codec
        self._most_running = largest
        self._live: dict[str, LiveRequest] = {}
        self._queue = StartQueue()
        self.wait = WaitModel(largest / controller.latency.rows_seconds(largest))
        self._free_starts = 0  # of those that have come since the last plan, who need not wait
        self._running: list[LiveRequest] = []  # oldest first
        self._preempted: list[LiveRequest] = []  # oldest first
        self._free_slots = list(range(config.num_slots - 1, -1, -1))
        self._flights: deque[Flight] = deque()
        self._steps = 0
        self._starts = 0

    # --- requests --------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises RejectedError, or ValueError for a request that cannot run.

        Whether it could ever run is asked first: of the reasons to refuse it, a full queue alone will pass.
        """
        check_program(request.program, self._codec.encode)
        if not request.prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
        forced, most = len(request.prompt) + longest_first_prefix(request.program), self.config.max_context
        if forced >= most:
            raise ValueError(f"{forced} tokens before the first one is sampled leave no room in {most}")
        if request.id in self._live:
            raise RejectedError("DUPLICATE", f"request {request.id!r} is already running")
        live = LiveRequest(
            request,
            now=now,
            pool=self.pool,
            codec=self._codec,
            free_slots=self._free_slots,
            max_context=self.config.max_context,
        )
        pages, whose = self.pool.num_pages, "there are"
        if self._most_client_pages < pages:
            pages, whose = int(self._most_client_pages), "a client may have"
        if live.worst_case_pages > pages:
            raise RejectedError(
                "KV_FULL",
                f"the request may need {live.worst_case_pages} KV pages of {self.pool.page_size} tokens,"
                f" and {whose} {pages}: lower max_tokens or the number of branches",
            )
        self._check_room(live, now)
        self._live[request.id] = live
        self._queue.append(live)

    def _check_room(self, live: LiveRequest, now: float) -> None:
        """Raises RejectedError where the queue is full, or the request would rather be refused than wait."""
        of_client = self._queue.waiting_of(live.request.client)
        if of_client >= self.config.max_client_queue:
            raise RejectedError("CLIENT_LIMIT", f"{of_client} requests of this client are waiting already")
        if len(self._queue) >= self.config.max_queue:
            raise RejectedError(
                "QUEUE_FULL", f"{len(self._queue)} requests are waiting already", self.start_gap
            )
        if live.request.slo.reject:
            self._check_in_time(live, now)

    def _check_in_time(self, live: LiveRequest, now: float) -> None:
        """Raises RejectedError for a request whose first token would come too late, in all likelihood."""
        clients, ttft = Counter(other.request.client for other in self._started), live.request.slo.ttft
        queued = self._queue.ahead_of(live.request.client, clients, self.config.max_client_running)
        unread = sum(len(other.request.prompt) for other in [*queued, *self._preempted])
        unread += sum(len(other.request.prompt) for other in self._running if not other.prompt_read)
        ahead = max(0, len(self._preempted) + len(queued) - self._free_starts)
        at_once = not self.wait.is_blocked and ahead == 0 and self._may_start(live, queued)
        starts = 0 if at_once else ahead + 1
        own, gap = self.wait.reading(len(live.request.prompt)), self.start_gap
        step = max([0.0, *(flight.end - now for flight in self._flights)]) + self._step_seconds
        others = self.wait.reading(unread)
        expected = step + max(gap * self.wait.longest(starts), others) + own
        if expected > ttft and (starts or unread):  # if nobody is before it, it cannot come sooner
            too_many = starts - self.wait.most_starts((ttft - own - step) / gap)
            retry = max(gap * too_many, others + own + step - ttft, step)
            text = f"the first token would come after about {expected:.3g} s, and the target is {ttft:.3g} s"
            raise RejectedError("SLO_UNATTAINABLE", text, retry)
        self._free_starts += at_once

    @property
    def start_gap(self) -> float:
        """Seconds between two starts while requests wait, as far as that is known."""
        return self.wait.gap(self._guessed_gap)

    def _guessed_gap(self) -> float:
        """As if all were to last as long as they may."""
        served = [*self._running, *self._queue][: max(1, len(self._running) + self._free_starts)]
        longest = sum(live.longest_chain for live in served) or 1
        return self._step_seconds * longest / max(1, len(served)) ** 2

    @property
    def _step_seconds(self) -> float:
        """What a step takes now."""
        return (
            self._flights[-1].forecast.seconds if self._flights else self.controller.latency.rows_seconds(1)
        )

    def give_up_late(self, now: float) -> list[str]:
        """Forget the requests that wait, would rather go elsewhere than be late, and will be; their ids.

        One that has been preempted waits for its first token again, if it has none.
        """
        waiting = [*self._queue] if self._queue.picky else []
        waiting += [live for live in self._preempted if live.pace.first_token is None]
        picky = [live for live in waiting if live.request.slo.reject]
        late = [live.request.id for live in picky if not self._can_make_it(live, now)]
        for request_id in late:
            self.cancel(request_id)
        return late

    def cancel(self, request_id: str) -> bool:
        """Forget a request: its pages and slots are free at once. False if it is unknown."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        live.release()
        self._leave(live)
        return True

    @property
    def live(self) -> Mapping[str, LiveRequest]:
        """Every request that has not ended, by its id."""
        return self._live

    @property
    def running(self) -> Sequence[LiveRequest]:
        """The requests that run, the oldest first."""
        return self._running

    @property
    def preempted(self) -> Sequence[LiveRequest]:
        """The requests that run no more and not yet again, the oldest first."""
        return self._preempted

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def idle(self) -> bool:
        """Nothing is queued, running or in flight."""
        return not self._live and not self._flights

    def load(self) -> SchedulerLoad:
        return SchedulerLoad(
            running_requests=len(self._running),
            running_branches=sum(live.width for live in self._running),
            queued_requests=len(self._queue) + len(self._preempted),
            kv_used_tokens=self.pool.owned * self.pool.page_size,
            kv_capacity_tokens=self.pool.num_pages * self.pool.page_size,
        )

    def check(self) -> None:
        """Raise AssertionError unless every request, page and slot is accounted for."""
        places = [*self._running, *self._preempted, *self._queue]
        assert len(places) == len(self._live), "a request is lost, or in two places"
        assert all(live.resident == (live in self._running) for live in places)
        for live in places:
            live.check()
        self.pool.check(segment.pages for live in self._live.values() for segment in live.segments.values())
        held = [b.slot for live in self._live.values() for b in live.branches.values() if b.slot is not None]
        assert sorted(held + self._free_slots) == list(range(self.config.num_slots)), (
            "a slot is lost or shared"
        )

    # --- steps -----------------------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledStep | None:
        """The next step, as of the predicted end of the step in flight; None if nothing can advance."""
        start = max([now, *(flight.end for flight in self._flights)])
        self._start_queued(start)
        holders = ((live, branch) for live in self._running[::-1] for branch in live.branches.values())
        draft = StepDraft(
            self._steps,
            start,
            self.pool,
            self.controller.latency,
            make_room=self._make_room,
            take_slot=partial(self._take_slot, holders),
        )
        unread = [live for live in self._running if not live.prompt_read]
        turns = self.controller.fill(draft, self._running, self._flights)
        return self._launch(draft, turns, unread) if draft.rows else None

    def _launch(self, draft: StepDraft, turns: list[Turn], unread: Sequence[LiveRequest]) -> ScheduledStep:
        """`unread`: the requests whose prompts had not been read before the step."""
        self._steps += 1
        widths: dict[LiveRequest, tuple[int, int]] = {}
        deferred: list[tuple[str, int]] = []
        for turn in turns:
            if turn.live.resident:
                advanced = draft.advanced.get(turn.live, {})
                if len(advanced) < len(turn.ready):
                    waiting = [branch.id for branch in turn.ready if branch not in advanced]
                    deferred += [(turn.live.request.id, branch) for branch in waiting]
                if advanced:
                    widths[turn.live] = (len(advanced), len(turn.ready))
        scheduled = draft.schedule(tuple(deferred))
        end = draft.start + scheduled.forecast.seconds
        rows = sum(draft.rows_of(live) for live in unread)
        read = rows, all(live.prompt_read for live in unread)
        self._flights.append(Flight(scheduled.step, scheduled.forecast, end, draft.sampling, widths, *read))
        for live in unread:
            if live.prompt_read:
                tokens = len(live.request.prompt)
                self.wait.prompt(tokens, tokens - live.cached_tokens)
        return scheduled

    # --- results ---------------------------------------------------------------------------------------

    def update(self, result: StepResult, now: float) -> list[Event]:
        """Take in a finished step, in the order of launching; the events are in the order of occurrence."""
        flight = self._flights.popleft()
        assert flight.step is result.step, "steps must be updated in the order in which they were scheduled"
        self.controller.learn(flight.forecast, result.seconds)
        if flight.prompt_rows:
            self.wait.read(result.seconds, flight.prompt_rows, all_there_was=flight.all_read)
        events: list[Event] = []
        for live, (width, wanted) in flight.widths.items():
            if self._live.get(live.request.id) is live:
                events += live.width_changed(width, wanted)
        samples = iter(result.samples)
        for entry in flight.step.entries:
            sample = next(samples) if entry.samples else None
            live = self._live.get(entry.request_id)
            if live is None:
                continue
            if sample is not None:
                events += live.accept(entry, sample, now)
            if live.finished:
                del self._live[live.request.id]
                self._leave(live)
        for live in flight.widths if self.config.prefix_cache else ():
            live.publish_prefix()
        return events

    # --- starting and preempting -----------------------------------------------------------------------

    def _start_queued(self, start: float) -> None:
        clients, pages = Counter[str](), Counter[str]()  # whose have started, and what they may come to need
        for live in self._started if self._queue or self._preempted else ():
            clients[live.request.client] += 1
            pages[live.request.client] += live.worst_case_pages
        while (live := self._next_to_start(start, clients, pages)) is not None:
            if not self._may_start(live):
                self.wait.waits(start)
                break
            self.wait.started(start)
            self._queue.start(live)
            self._leave(live)
            if live.pace.started is None:
                clients[live.request.client] += 1
                pages[live.request.client] += live.worst_case_pages
                live.age = self._starts
                self._starts += 1
            live.resume(start)
            insort(self._running, live, key=_age)
        else:
            self.wait.nobody_waits()
        self._free_starts = 0

    @property
    def _started(self) -> list[LiveRequest]:
        """The requests that have left the queue, those included that wait again."""
        return [*self._running, *self._preempted]

    @property
    def _most_client_pages(self) -> float:
        return self.config.max_client_kv * self.pool.num_pages

    def _next_to_start(
        self, start: float, clients: Mapping[str, int], pages: Mapping[str, int]
    ) -> LiveRequest | None:
        """Preempted requests first; then those that can still meet their TTFT target, then the others.

        clients  how many requests of each have started; pages, what these may need in all
        """
        if self._preempted and self._may_start(self._preempted[0]):
            return self._preempted[0]
        turn = self.controller.LATE_TURN

        def is_within(live: LiveRequest) -> bool:
            client = live.request.client
            few = clients.get(client, 0) < self.config.max_client_running
            return few and pages.get(client, 0) + live.worst_case_pages <= self._most_client_pages

        found = self._queue.next(
            clients,
            is_within,
            partial(self._can_make_it, start=start),
            missed_first=self._starts % turn == turn - 1,
        )
        return self._around_preempted(found, clients) if self._preempted else found

    def _around_preempted(self, queued: LiveRequest | None, clients: Mapping[str, int]) -> LiveRequest:
        """Where the oldest preempted request has no room yet: another one that has, whose client has fewer
        requests beside it, or else the oldest. So a client whose limits do not fit together holds up its own
        requests, and nobody is passed who has no other.
        """

        def beside(live: LiveRequest) -> int:
            return clients.get(live.request.client, 0) - (live.pace.started is not None)

        first, *others = self._preempted
        if queued is not None:
            others.append(queued)
        for live in others:
            if beside(live) < beside(first) and self._may_start(live):
                return live
        return first

    def _can_make_it(self, live: LiveRequest, start: float) -> bool:
        """Whether its first token can come in time if it starts at `start`.

        Twice the mean time of reading is provided for, but half of the target at most: what is known of
        reading is learned from those that start.
        """
        reading = min(2 * self.wait.reading(len(live.request.prompt)), live.request.slo.ttft / 2)
        return live.pace.ttft_deadline > start + reading

    def _may_start(self, live: LiveRequest, before: Sequence[LiveRequest] = ()) -> bool:
        """Whether the step with it stays within everybody's target, and its worst case fits now.

        What running requests have still to read is theirs already, and a share of their worst case; those in
        `before` start first. Whoever would be alone may always start.
        """
        running = [*self._running, *before] if before else self._running
        if not running:
            return True
        if len(running) >= self._most_running or not self.controller.may_start(live, running):
            return False
        reserved = sum(running.reserved_pages(self.config.reserve) for running in self._running)
        reserved += sum(other.worst_case_pages for other in before)
        return live.worst_case_pages <= self.pool.available - reserved

    def _make_room(self, draft: StepDraft, live: LiveRequest, pages: int) -> bool:
        """Preempt requests younger than `live` that the draft does not advance, until `pages` are available.

        The youngest goes first: the tails of its branches whose turn is not next, then all of it.
        """
        for victim in reversed(self._running):
            if self.pool.available >= pages or victim.age <= live.age:
                break
            if victim in draft.advanced or not victim.holds_pages:
                continue
            for branch in victim.runnable()[1:]:
                if self.pool.available < pages:
                    victim.drop_tail(branch)
            if self.pool.available < pages:
                victim.preempt()
                self._running.remove(victim)
                insort(self._preempted, victim, key=_age)
        return self.pool.available >= pages

    def _take_slot(self, holders: Iterator[tuple[LiveRequest, Branch]]) -> int:
        """A free slot, or that of the next holder which sits this step out and whose last token is known.

        There is one: at most two buckets of branches are in the draft or in flight.
        """
        while not self._free_slots:
            live, branch = next(holders)
            if not branch.in_flight:
                live.free_slot(branch)
        return self._free_slots.pop()

    def _leave(self, live: LiveRequest) -> None:
        self._queue.discard(live)
        for place in (self._running, self._preempted):
            if live in place:
                place.remove(live)
        if not self._queue and not self._preempted:
            self.wait.nobody_waits()


def _age(live: LiveRequest) -> int:
    return live.age
