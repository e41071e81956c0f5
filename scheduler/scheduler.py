"""The scheduler: which tokens the next step computes.

    schedule(now) -> ScheduledStep  decides, takes pages, advances what is *computed*
    update(result, now) -> [Event]  learns the sampled tokens, forks, joins and finishes

One step may be in flight while the next is planned. There are no phases: a prompt being read, a seed, a
replay after a preemption and a decoding branch are all segments with tokens that are not computed yet.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Literal, NamedTuple

from scheduler.branch import Branch
from scheduler.draft import StepDraft
from scheduler.events import Event
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.policy import AdmissionPolicy, Baseline, Extra, policy
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.program import Codec, check_program, longest_first_prefix
from scheduler.request import Request
from scheduler.slack import ControllerConfig, pace, prompt_deadline, slack
from scheduler.step import Forecast, ScheduledStep, Step, StepResult


class RejectedError(Exception):
    """A request that cannot be queued."""

    def __init__(self, reason: Literal["QUEUE_FULL", "KV_FULL", "DUPLICATE"], detail: str) -> None:
        super().__init__(detail)
        self.reason: Literal["QUEUE_FULL", "KV_FULL", "DUPLICATE"] = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and the controller's settings. The same numbers hold for every policy.

    num_pages, page_size  the KV pool
    num_slots             branches that can keep device state at once; at least twice the largest bucket
    max_context           positions that a branch may fill
    max_queue             requests that may wait
    max_chunk             prompt tokens of one request in a step
    prompt_floor          prompt tokens that a step reads whatever the slack
    controller            what the budget of a step follows from
    prefix_cache          keep full prompt pages for later requests
    """

    num_pages: int
    page_size: int
    num_slots: int
    max_context: int
    max_queue: int = 1024
    max_chunk: int = 512
    prompt_floor: int = 32
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    prefix_cache: bool = True
    policy: str = "taper"


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    running_requests: int
    running_branches: int
    queued_requests: int
    kv_used_tokens: int
    kv_capacity_tokens: int


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step and when it should end.

    sampling  the requests that it should give a token
    widths    for each request in it, how many branches advance, and how many were ready
    """

    step: Step
    load: StepLoad
    end: float
    sampling: set[LiveRequest]
    widths: dict[LiveRequest, tuple[int, int]]


class _Turn(NamedTuple):
    """A running request and its branches that could advance, the least recently advanced first."""

    live: LiveRequest
    ready: Sequence[Branch]

    @property
    def branch(self) -> Branch:
        """The branch whose turn it is."""
        return self.ready[0]


_Candidate = tuple[LiveRequest, Branch]


class Scheduler:
    """Requests in, steps out; holds every page and slot. Not thread-safe; has no clock.

    A request waits (`_queue`), runs (`_running`), perhaps waits again without its pages (`_preempted`), and
    is gone.
    """

    START_MARGIN = 0.95  # share of the TPOT target that a step may take with one request more
    LATE_TURN = 8  # one start and one prompt floor in so many go to who has missed the TTFT target
    FILL_SHARE = 0.01  # share of the TPOT target by which filling the bucket may lengthen a step

    def __init__(self, config: SchedulerConfig, latency: StepLatencyModel, codec: Codec) -> None:
        if config.num_slots < 2 * latency.buckets.largest:
            raise ValueError(f"{config.num_slots} slots are fewer than twice the largest bucket's rows")
        self.config = config
        self.latency = latency
        self.pool = PagePool(config.num_pages, config.page_size)
        self.policy: AdmissionPolicy = policy(config.policy)
        self._codec = codec
        self._floor = max(1, min(config.prompt_floor, latency.buckets.largest // 2))
        self._live: dict[str, LiveRequest] = {}
        self._queue: deque[LiveRequest] = deque()
        self._running: list[LiveRequest] = []  # oldest first
        self._preempted: list[LiveRequest] = []  # oldest first
        self._free_slots = list(range(config.num_slots - 1, -1, -1))
        self._flights: deque[_Flight] = deque()
        self._baseline = StepLoad(0)  # what decoding requests forced the last step to hold
        self._steps = 0
        self._starts = 0

    # --- requests --------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises RejectedError, or ValueError for a request that cannot run."""
        check_program(request.program)
        if not request.prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
        forced, most = len(request.prompt) + longest_first_prefix(request.program), self.config.max_context
        if forced >= most:
            raise ValueError(f"{forced} tokens before the first one is sampled leave no room in {most}")
        if request.id in self._live:
            raise RejectedError("DUPLICATE", f"request {request.id!r} is already running")
        if len(self._queue) >= self.config.max_queue:
            raise RejectedError("QUEUE_FULL", f"{len(self._queue)} requests are waiting already")
        live = LiveRequest(
            request,
            now=now,
            pool=self.pool,
            codec=self._codec,
            free_slots=self._free_slots,
            max_context=self.config.max_context,
        )
        if live.worst_case_pages > self.pool.num_pages:
            raise RejectedError(
                "KV_FULL",
                f"the request may need {live.worst_case_pages} KV pages of {self.pool.page_size} tokens,"
                f" and there are {self.pool.num_pages}: lower max_tokens or the number of branches",
            )
        self._live[request.id] = live
        self._queue.append(live)

    def cancel(self, request_id: str) -> bool:
        """Forget a request: its pages and slots are free at once. False if it is unknown."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        live.release()
        self._leave(live)
        return True

    def set_policy(self, name: str) -> None:
        """Switch the admission policy from the next step on. Raises ValueError."""
        self.policy = policy(name)

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

    # --- planning --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledStep | None:
        """The next step, as of the predicted end of the step in flight; None if nothing can advance."""
        start = max([now, *(flight.end for flight in self._flights)])
        self._start_queued(start)
        holders = ((live, branch) for live in self._running[::-1] for branch in live.branches.values())
        draft = StepDraft(
            self._steps,
            start,
            self.pool,
            self.latency,
            make_room=self._make_room,
            take_slot=partial(self._take_slot, holders),
        )
        decoding, reading = self._turns()
        self._add_baseline(draft, decoding, reserved=bool(reading))
        self._baseline = draft.load
        self._add_floor(draft, reading)
        if not draft.rows:
            return None
        draft.baseline = draft.seconds()
        extras, candidates = self._extras(draft, decoding)
        draft.budget = self._budget(draft, decoding, reading, extras)
        self._read_prompts(draft, reading, at_pace=True)
        for extra in self._admitted(draft, extras):
            if draft.room >= extra.rows:
                draft.add(*candidates[extra.candidate], extra.rows)
        self._read_prompts(draft, reading, at_pace=False)
        return self._launch(draft, [*decoding, *reading])

    def _turns(self) -> tuple[list[_Turn], list[_Turn]]:
        """The running requests that can advance: those that decode, oldest first, and those that read.

        A request reads while each of its branches has more to compute than a decode step should carry: a
        prompt, a joined text, a replay. It is paced, while a decoding request has a deadline.
        """
        decoding: list[_Turn] = []
        reading: list[_Turn] = []
        for live in self._running:
            ready = live.runnable()
            if not ready:
                continue
            decodes = live.prompt_read and any(branch.backlog <= self._floor for branch in ready)
            (decoding if decodes else reading).append(_Turn(live, ready))
        reading.sort(key=lambda turn: turn.live.reading_deadline)
        return decoding, reading

    def _add_baseline(self, draft: StepDraft, decoding: list[_Turn], *, reserved: bool) -> None:
        """Every decoding request advances one branch; oldest first, since the oldest may preempt the others.

        There is a row for each of them, and, if `reserved`, one for a request that reads.
        """
        waiting = len(decoding) + reserved
        for turn in decoding:
            waiting -= 1
            if turn.live.resident:  # nobody has preempted it meanwhile
                draft.add(turn.live, turn.branch, min(self._floor, draft.room - waiting), must=True)

    def _add_floor(self, draft: StepDraft, reading: list[_Turn]) -> None:
        """Prompts never starve: the one due first reads a little in every step.

        Those that have missed their target come last, but for one step in LATE_TURN.
        """
        if self._steps % self.LATE_TURN:
            reading = sorted(reading, key=lambda turn: turn.live.reading_deadline <= draft.start)
        for turn in reading:
            if turn.live.resident and draft.add(turn.live, turn.branch, self._floor, must=True):
                return

    def _extras(self, draft: StepDraft, decoding: list[_Turn]) -> tuple[list[Extra], list[_Candidate]]:
        """Ready branches beyond the baseline, the oldest request's first, least recently advanced first.

        Where several of them would read what nobody reads yet, each is priced as if it came alone.
        """
        extras: list[Extra] = []
        candidates: list[_Candidate] = []
        for group, (live, ready) in enumerate(decoding):
            if len(ready) == 1 or live not in draft.advanced:
                continue
            others, priority = ready[1:], live.request.priority
            for branch, (rows, seconds) in zip(others, draft.prices(others), strict=True):
                if rows <= self._floor:
                    extras.append(Extra(len(extras), group, rows, seconds, priority))
                    candidates.append((live, branch))
        return extras, candidates

    def _budget(
        self, draft: StepDraft, decoding: list[_Turn], reading: list[_Turn], extras: Sequence[Extra]
    ) -> float:
        """Seconds that the step may take (see scheduler.slack). Without decoding requests nobody is hurt."""
        protected = [turn.live for turn in decoding if turn.live in draft.advanced]
        if not protected:
            return math.inf
        control = self.config.controller
        deadlines = self._deadlines(protected)
        if any(deadline - draft.start >= draft.baseline for deadline in deadlines):
            deadlines += self._prompt_deadlines(draft, reading)
        margin = self.latency.accuracy.margin if control.rho is None else 0.0
        spare = slack(deadlines, draft.start, draft.baseline, margin)
        budget = draft.baseline + (1.0 if control.rho is None else control.rho) * spare
        most = draft.baseline + self.FILL_SHARE * min(live.request.slo.tpot for live in protected)
        if control.fill and budget < most:
            budget = max(budget, min(self._filled(draft, extras), most))
        return budget

    def _deadlines(self, decoding: Sequence[LiveRequest]) -> list[float]:
        """When the next token of each is due; what is in flight is expected when its step should end."""
        expected = {live: flight.end for flight in self._flights for live in flight.sampling}
        return [live.deadline(self.config.controller, expected.get(live)) for live in decoding]

    def _prompt_deadlines(self, draft: StepDraft, reading: list[_Turn]) -> list[float]:
        """When the next chunk of each prompt is due."""
        due = [
            prompt_deadline(
                turn.live.reading_deadline,
                draft.start,
                max(1, draft.left(turn.branch)),
                self.config.max_chunk,
            )
            for turn in reading
            if turn.live.resident
        ]
        return [deadline for deadline in due if deadline is not None]

    def _filled(self, draft: StepDraft, extras: Sequence[Extra]) -> float:
        """Predicted seconds with ready branches in the padding of the baseline's own bucket."""
        room = draft.bucket - draft.rows
        if room == 0:
            return draft.baseline
        seconds = 0.0
        for extra in sorted(extras, key=attrgetter("seconds")):
            if extra.rows > room:
                break
            room -= extra.rows
            seconds += extra.seconds
        return draft.baseline + seconds

    def _admitted(self, draft: StepDraft, extras: Sequence[Extra]) -> Sequence[Extra]:
        step = Baseline(draft.rows, self.latency.reading_seconds(draft.load), draft.budget)
        return self.policy.admit(extras, step, self.latency)

    def _read_prompts(self, draft: StepDraft, reading: list[_Turn], *, at_pace: bool) -> None:
        """Read prompts within the budget: up to the pace of their TTFT target, or all that fits."""
        for turn in reading:
            left = draft.left(turn.branch)
            if not left or not turn.live.resident:
                continue
            wanted = self.config.max_chunk
            if at_pace:
                seconds = draft.budget if math.isfinite(draft.budget) else draft.seconds()
                wanted = min(wanted, pace(turn.live.reading_deadline, draft.start, left, seconds))
            rows = draft.affordable(turn.branch, min(wanted - draft.rows_of(turn.live), left))
            if rows:
                draft.add(turn.live, turn.branch, rows)

    def _launch(self, draft: StepDraft, turns: list[_Turn]) -> ScheduledStep:
        self._steps += 1
        widths: dict[LiveRequest, tuple[int, int]] = {}
        deferred: list[tuple[str, int]] = []
        for turn in turns:
            if turn.live.resident:
                advanced = draft.advanced.get(turn.live, {})
                waiting = [branch.id for branch in turn.ready if branch not in advanced]
                deferred += [(turn.live.request.id, branch) for branch in waiting]
                if advanced:
                    widths[turn.live] = (len(advanced), len(turn.ready))
        step = Step(draft.step_id, draft.entries, tuple(draft.slots), draft.bucket)
        forecast = Forecast(
            load=draft.load,
            seconds=draft.seconds(),
            baseline_seconds=draft.baseline,
            budget_seconds=draft.budget,
            deferred=tuple(deferred),
        )
        end = draft.start + forecast.seconds
        self._flights.append(_Flight(step, forecast.load, end, draft.sampling, widths))
        return ScheduledStep(step, forecast)

    # --- results ---------------------------------------------------------------------------------------

    def update(self, result: StepResult, now: float) -> list[Event]:
        """Take in a finished step, in the order of launching; the events are in the order of occurrence."""
        flight = self._flights.popleft()
        assert flight.step is result.step, "steps must be updated in the order in which they were scheduled"
        self.latency.observe(flight.load, result.seconds)
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
        while (self._preempted or self._queue) and len(self._running) < self.latency.buckets.largest:
            live = self._next_to_start(start)
            if self._running and not self._may_start(live):
                return
            self._leave(live)
            if live.started_at is None:
                live.age = self._starts
                self._starts += 1
            live.resume(start)
            insort(self._running, live, key=_age)

    def _next_to_start(self, start: float) -> LiveRequest:
        """Preempted requests first; then those that can still meet their TTFT target, then the others."""
        if self._preempted:
            return self._preempted[0]
        on_time = (live for live in self._queue if live.ttft_deadline > start)
        missed = (live for live in self._queue if live.ttft_deadline <= start)
        late_first = self._starts % self.LATE_TURN == self.LATE_TURN - 1
        return next(chain(missed, on_time) if late_first else chain(on_time, missed))

    def _may_start(self, live: LiveRequest) -> bool:
        """Whether the step with it stays within everybody's TPOT target, and its worst case fits now.

        The step is the last one's baseline, a row for each request that still reads its prompt, and the
        floor. What running requests have still to read is theirs already, and a share of their worst case.
        """
        load = self._baseline.plus(StepLoad(self._floor, private_kv=self._floor))
        for other in (*self._running, live):
            if not other.prompt_read:
                load = load.plus(StepLoad(1, private_kv=len(other.request.prompt), items=1))
        tightest = min(other.request.slo.tpot for other in (*self._running, live))
        rows = min(load.rows, self.latency.buckets.largest)
        if self.latency.predict(load._replace(rows=rows)) > self.START_MARGIN * tightest:
            return False
        share = self.config.controller.reserve
        reserved = sum(running.reserved_pages(share) for running in self._running)
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
        for place in (self._running, self._preempted, self._queue):
            if live in place:
                place.remove(live)


def _age(live: LiveRequest) -> int:
    return live.age
