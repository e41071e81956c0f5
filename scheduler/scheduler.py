"""The scheduler: which tokens the next step computes.

    schedule(now) -> ScheduledStep  decides, takes pages, advances what is *computed*
    update(result, now) -> [Event]  learns the sampled tokens, forks, joins and finishes

One step may be in flight while the next is planned. There are no phases: a prompt being read, a seed, a
replay after a preemption and a decoding branch are all segments with tokens that are not computed yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from scheduler.branch import Branch
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller, Turn
from scheduler.cursor import Codec
from scheduler.draft import StepDraft
from scheduler.events import Event
from scheduler.flight import Flight
from scheduler.gate import Gate, RejectedError
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.program import check_program, longest_first_prefix
from scheduler.request import Request
from scheduler.roster import Roster
from scheduler.step import ScheduledStep, StepResult
from scheduler.wait import WaitModel


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

    The gate decides which newcomers may wait, the roster which requests run, the controller what steps take.
    """

    def __init__(self, config: SchedulerConfig, controller: Controller, codec: Codec) -> None:
        largest = controller.latency.buckets.largest
        if config.num_slots < 2 * largest:
            raise ValueError(f"{config.num_slots} slots are fewer than twice the largest bucket's rows")
        self.config = config
        self.controller = controller
        self.pool = PagePool(config.num_pages, config.page_size)
        self.wait = WaitModel(largest / controller.latency.rows_seconds(largest))
        self._codec = codec
        self._live: dict[str, LiveRequest] = {}
        self._flights: deque[Flight] = deque()
        self._roster = Roster(config, controller, self.pool, self.wait)
        self._gate = Gate(config, self._roster, self.wait, controller.latency, self._flights)
        self._free_slots = list(range(config.num_slots - 1, -1, -1))
        self._steps = 0

    # --- requests --------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises RejectedError, or ValueError for a request that cannot run."""
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
        self._gate.check(live, now)
        self._live[request.id] = live
        self._roster.queue.append(live)

    @property
    def start_gap(self) -> float:
        """Seconds between two starts while requests wait, as far as that is known."""
        return self._gate.start_gap

    def give_up_late(self, now: float) -> list[str]:
        """Forget the requests that wait, would rather go elsewhere than be late, and will be; their ids."""
        late = [live.request.id for live in self._roster.late(now)]
        for request_id in late:
            self.cancel(request_id)
        return late

    def cancel(self, request_id: str) -> bool:
        """Forget a request: its pages and slots are free at once. False if it is unknown."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        live.release()
        self._roster.leave(live)
        return True

    @property
    def live(self) -> Mapping[str, LiveRequest]:
        """Every request that has not ended, by its id."""
        return self._live

    @property
    def running(self) -> Sequence[LiveRequest]:
        """The requests that run, the oldest first."""
        return self._roster.running

    @property
    def preempted(self) -> Sequence[LiveRequest]:
        """The requests that run no more and not yet again, the oldest first."""
        return self._roster.preempted

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def idle(self) -> bool:
        """Nothing is queued, running or in flight."""
        return not self._live and not self._flights

    def load(self) -> SchedulerLoad:
        return SchedulerLoad(
            running_requests=len(self.running),
            running_branches=sum(live.width for live in self.running),
            queued_requests=self._roster.num_waiting,
            kv_used_tokens=self.pool.owned * self.pool.page_size,
            kv_capacity_tokens=self.pool.num_pages * self.pool.page_size,
        )

    def check(self) -> None:
        """Raise AssertionError unless every request, page and slot is accounted for."""
        lives = [*self._roster]
        assert len(lives) == len(self._live), "a request is lost, or in two places"
        self._roster.check()
        for live in lives:
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
        self._roster.start_waiting(start)
        self._gate.planned()
        holders = ((live, branch) for live in self.running[::-1] for branch in live.branches.values())
        draft = StepDraft(
            self._steps,
            start,
            self.pool,
            self.controller.latency,
            make_room=self._roster.make_room,
            take_slot=partial(self._take_slot, holders),
        )
        unread = [live for live in self.running if not live.prompt_read]
        turns = self.controller.fill(draft, self.running, self._flights)
        return self._launch(draft, turns, unread) if draft.rows else None

    def _take_slot(self, holders: Iterator[tuple[LiveRequest, Branch]]) -> int:
        """A free slot, or that of the next holder which sits this step out and whose last token is known.

        There is one: at most two buckets of branches are in the draft or in flight.
        """
        while not self._free_slots:
            live, branch = next(holders)
            if not branch.in_flight:
                live.free_slot(branch)
        return self._free_slots.pop()

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
                self._roster.leave(live)
        for live in flight.widths if self.config.prefix_cache else ():
            live.publish_prefix()
        return events
