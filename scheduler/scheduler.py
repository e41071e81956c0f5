"""The scheduler: which tokens the next step computes.

    schedule(now) -> StepPlan       decides, takes pages, advances what is *computed*
    update(result, now) -> [Event]  learns the sampled tokens, forks, joins and finishes

One step may be in flight while the next is planned. There are no phases: a prompt being read, a seed, a
replay after a preemption and a decoding branch are all segments with tokens that are not computed yet.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scheduler.draft import StepDraft
from scheduler.events import Event, WidthChanged
from scheduler.live_request import Branch, LiveRequest
from scheduler.pages import PagePool
from scheduler.plan import StepPlan, StepResult
from scheduler.policy import AdmissionPolicy, Baseline, Extra, policy
from scheduler.predictor import StepLatencyModel
from scheduler.program import Codec, check_program
from scheduler.request import Request
from scheduler.slack import pace, prompt_deadline, slack


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
    rho                   share of the slack that extra work may spend
    fill                  let ready branches use the padding of the baseline's bucket
    prefix_cache          keep full prompt pages for later requests
    """

    num_pages: int
    page_size: int
    num_slots: int
    max_context: int
    max_queue: int = 1024
    max_chunk: int = 512
    prompt_floor: int = 32
    rho: float = 0.8
    fill: bool = True
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
    """A launched step: its plan, when it should end, and the (width, wanted) that it changed."""

    plan: StepPlan
    end: float
    widths: dict[str, tuple[int, int]]


class Scheduler:
    """Requests in, step plans out; holds every page and slot. Not thread-safe; has no clock."""

    START_MARGIN = 0.95  # share of the TPOT target that a step may take with one request more
    LATE_START = 8  # one start in so many goes to a request that has missed its TTFT target
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
        self._running: list[LiveRequest] = []  # oldest first
        self._queue: deque[LiveRequest] = deque()  # preempted ones first
        self._free_slots = list(range(config.num_slots - 1, -1, -1))
        self._flights: deque[_Flight] = deque()
        self._steps = 0
        self._starts = 0

    # --- requests --------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises RejectedError, or ValueError for a program that cannot run."""
        check_program(request.program)
        if not request.prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
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
    def idle(self) -> bool:
        """Nothing is queued, running or in flight."""
        return not self._live and not self._flights

    def load(self) -> SchedulerLoad:
        return SchedulerLoad(
            running_requests=len(self._running),
            running_branches=sum(len(live.branches) for live in self._running),
            queued_requests=len(self._queue),
            kv_used_tokens=self.pool.owned * self.pool.page_size,
            kv_capacity_tokens=self.pool.num_pages * self.pool.page_size,
        )

    def check(self) -> None:
        """Raise AssertionError unless every page and slot is accounted for."""
        self.pool.check(segment.pages for live in self._live.values() for segment in live.segments.values())
        held = [b.slot for live in self._live.values() for b in live.branches.values() if b.slot is not None]
        assert sorted(held + self._free_slots) == list(range(self.config.num_slots)), (
            "a slot is lost or shared"
        )

    # --- planning --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, as of the predicted end of the step in flight; None if nothing can advance."""
        start = max([now, *(flight.end for flight in self._flights)])
        self._start_queued(start)
        draft = StepDraft(self._steps, self.pool, self.latency, self._make_room, self._take_slot)
        decoding, reading = self._turns()
        self._add_baseline(draft, decoding)
        self._add_floor(draft, reading, start)
        if not draft.entries:
            return None
        baseline = draft.seconds()
        extras = self._extras(draft, decoding)
        budget = self._budget(draft, start, baseline, decoding, reading, extras)
        self._read_prompts(draft, reading, budget, start, at_pace=True)
        self._admit(draft, extras, budget)
        self._read_prompts(draft, reading, budget, start, at_pace=False)
        return self._launch(draft, start, baseline, budget)

    def _turns(self) -> tuple[list[tuple[LiveRequest, Branch]], list[tuple[LiveRequest, Branch]]]:
        """Each running request with the branch whose turn it is: those that decode, and those that read.

        To read is to have more to compute than a decode step should carry: a prompt, a joined text, a
        replay. It is paced, while a decoding request has a deadline.
        """
        decoding: list[tuple[LiveRequest, Branch]] = []
        reading: list[tuple[LiveRequest, Branch]] = []
        for live in self._running:
            for branch in live.runnable()[:1]:
                backlog = branch.backlog
                decodes = live.first_token is not None and backlog <= self._floor
                (decoding if decodes else reading).append((live, branch))
        reading.sort(key=lambda turn: turn[0].reading_deadline)
        return decoding, reading

    def _add_baseline(self, draft: StepDraft, decoding: list[tuple[LiveRequest, Branch]]) -> None:
        """Every decoding request advances; oldest first, since the oldest may preempt the others."""
        waiting = len(decoding)
        for live, branch in decoding:
            waiting -= 1
            if live in self._running:  # not preempted meanwhile
                draft.add(live, branch, draft.room - waiting, must=True)

    def _add_floor(self, draft: StepDraft, reading: list[tuple[LiveRequest, Branch]], start: float) -> None:
        """Prompts never starve: the one due first reads a little in every step; missed ones come last."""
        for live, branch in sorted(reading, key=lambda turn: turn[0].reading_deadline <= start):
            if live in self._running and draft.add(live, branch, self._floor, must=True):
                return

    def _extras(self, draft: StepDraft, decoding: list[tuple[LiveRequest, Branch]]) -> dict[Extra, Branch]:
        """Ready branches beyond the baseline, least recently advanced first."""
        extras: dict[Extra, Branch] = {}
        for live, _ in decoding:
            taken = draft.advanced.get(live.request.id, [])
            for branch in live.runnable() if taken else ():
                if branch not in taken and branch.backlog <= self._floor:
                    kv_tokens = draft.unread(branch) + branch.backlog
                    extras[Extra((live.request.id, branch.id), branch.backlog, kv_tokens)] = branch
        return extras

    def _budget(
        self,
        draft: StepDraft,
        start: float,
        baseline: float,
        decoding: list[tuple[LiveRequest, Branch]],
        reading: list[tuple[LiveRequest, Branch]],
        extras: Iterable[Extra],
    ) -> float:
        """Seconds that the step may take (see scheduler.slack). Without decoding requests nobody is hurt."""
        protected = [live for live, _ in decoding if live.request.id in draft.advanced]
        if not protected:
            return math.inf
        expected = {e.request_id: f.end for f in self._flights for e in f.plan.entries if e.samples}
        deadlines = [live.deadline(expected.get(live.request.id)) for live in protected]
        if any(deadline - start >= baseline for deadline in deadlines):
            for live, branch in reading:
                left = max(1, draft.left(branch))
                due = prompt_deadline(live.reading_deadline, start, left, self.config.max_chunk)
                deadlines += [due] if due is not None else []
        budget = baseline + self.config.rho * slack(deadlines, start, baseline)
        if self.config.fill:
            tightest = min(live.request.slo.tpot for live in protected)
            budget = max(budget, min(self._filled(draft, extras), baseline + self.FILL_SHARE * tightest))
        return budget

    def _filled(self, draft: StepDraft, extras: Iterable[Extra]) -> float:
        """Predicted seconds with ready branches in the padding of the baseline's own bucket."""
        room = self.latency.buckets.fit(draft.rows) - draft.rows
        kv_tokens = 0
        for extra in sorted(extras, key=lambda extra: extra.kv_tokens):
            if extra.rows > room:
                break
            room -= extra.rows
            kv_tokens += extra.kv_tokens
        return draft.seconds(0, kv_tokens)

    def _admit(self, draft: StepDraft, extras: dict[Extra, Branch], budget: float) -> None:
        step = Baseline(draft.rows, draft.kv_tokens, budget)
        for extra in self.policy.admit(list(extras), step, self.latency):
            if draft.room >= extra.rows:
                draft.add(self._live[extra.key[0]], extras[extra], extra.rows)

    def _read_prompts(
        self,
        draft: StepDraft,
        reading: list[tuple[LiveRequest, Branch]],
        budget: float,
        start: float,
        *,
        at_pace: bool,
    ) -> None:
        """Read prompts within the budget: up to the pace of their TTFT target, or all that fits."""
        for live, branch in reading:
            left = draft.left(branch)
            if not left or live not in self._running:
                continue
            wanted = self.config.max_chunk
            if at_pace:
                step_seconds = budget if math.isfinite(budget) else draft.seconds()
                wanted = min(wanted, pace(live.reading_deadline, start, left, step_seconds))
            rows = min(wanted - draft.rows_of(live), left)
            draft.add(live, branch, draft.affordable(branch, rows, budget))

    def _launch(self, draft: StepDraft, start: float, baseline: float, budget: float) -> StepPlan:
        self._steps += 1
        widths: dict[str, tuple[int, int]] = {}
        deferred: list[tuple[str, int]] = []
        for live in self._running:
            advanced = draft.advanced.get(live.request.id, [])
            waiting = [branch for branch in live.runnable() if branch not in advanced]
            deferred += [(live.request.id, branch.id) for branch in waiting]
            width = (len(advanced), len(advanced) + len(waiting))
            if advanced and width != live.reported_width:
                live.reported_width = widths[live.request.id] = width
        plan = StepPlan(
            step_id=draft.step_id,
            entries=tuple(draft.entries),
            slots=tuple(draft.slots),
            deferred=tuple(deferred),
            bucket=self.latency.buckets.fit(draft.rows),
            rows=draft.rows,
            kv_tokens=draft.kv_tokens,
            predicted_seconds=draft.seconds(),
            baseline_seconds=baseline,
            budget_seconds=budget,
        )
        self._flights.append(_Flight(plan, start + plan.predicted_seconds, widths))
        return plan

    # --- results ---------------------------------------------------------------------------------------

    def update(self, result: StepResult, now: float) -> list[Event]:
        """Take in a finished step, in the order of launching; the events are in the order of occurrence."""
        flight = self._flights.popleft()
        plan = flight.plan
        assert plan is result.plan, "steps must be updated in the order in which they were scheduled"
        self.latency.observe(plan.rows, plan.kv_tokens, result.seconds)
        events: list[Event] = [
            WidthChanged(request_id, width, wanted)
            for request_id, (width, wanted) in flight.widths.items()
            if request_id in self._live
        ]
        samples = iter(result.samples)
        for entry in plan.entries:
            sample = next(samples) if entry.samples else None
            live = self._live.get(entry.request_id)
            if live is None:
                continue
            if sample is not None:
                events += live.accept(entry, sample, now)
            if live.finished:
                del self._live[live.request.id]
                self._leave(live)
            elif self.config.prefix_cache:
                live.publish_prefix()
        return events

    # --- starting and preempting -----------------------------------------------------------------------

    def _start_queued(self, start: float) -> None:
        while self._queue and len(self._running) < self.latency.buckets.largest:
            live = self._next_to_start(start)
            if self._running and not self._may_start(live):
                return
            self._queue.remove(live)
            if live.started_at is None:
                live.age = self._starts
                self._starts += 1
            live.resume(start)
            self._running.append(live)
            self._running.sort(key=lambda running: running.age)

    def _next_to_start(self, start: float) -> LiveRequest:
        """Preempted requests first; then those that can still meet their TTFT target, then the others."""
        if self._queue[0].started_at is not None:
            return self._queue[0]
        missed = [live for live in self._queue if live.ttft_deadline <= start]
        if len(missed) == len(self._queue) or (
            missed and self._starts % self.LATE_START == self.LATE_START - 1
        ):
            return missed[0]
        return next(live for live in self._queue if live.ttft_deadline > start)

    def _may_start(self, live: LiveRequest) -> bool:
        """Whether its worst case fits now, and the step with it stays within everybody's TPOT target."""
        if live.worst_case_pages > self.pool.available:
            return False
        rows = min(len(self._running) + self._floor, self.latency.buckets.largest)
        kv_tokens = self.pool.owned * self.pool.page_size + self._floor
        tightest = min(other.request.slo.tpot for other in (*self._running, live))
        return self.latency.predict(rows, kv_tokens) <= self.START_MARGIN * tightest

    def _make_room(self, draft: StepDraft, live: LiveRequest, pages: int) -> bool:
        """Preempt requests younger than `live` that the draft does not advance, until `pages` are available.

        First the tails of the branches that have waited longest, then the whole request.
        """
        for victim in reversed(self._running):
            if self.pool.available >= pages or victim.age <= live.age:
                break
            if victim.request.id in draft.advanced:
                continue
            for branch in victim.runnable()[1:]:
                if self.pool.available < pages:
                    victim.drop_tail(branch)
            if self.pool.available < pages:
                victim.preempt()
                self._running.remove(victim)
                self._queue.appendleft(victim)
        return self.pool.available >= pages

    def _take_slot(self, draft: StepDraft) -> int:
        """A free slot, or that of a branch which sits this step out and whose last token is known.

        There is one: at most two buckets of branches are in the draft or in flight.
        """
        if not self._free_slots:
            live, branch = next(
                (live, branch)
                for live in reversed(self._running)
                for branch in live.branches.values()
                if branch.slot is not None
                and not branch.in_flight
                and branch not in draft.advanced.get(live.request.id, ())
            )
            live.free_slot(branch)
        return self._free_slots.pop()

    def _leave(self, live: LiveRequest) -> None:
        if live in self._running:
            self._running.remove(live)
        elif live in self._queue:
            self._queue.remove(live)
