"""The gate: which newcomers may wait, and which are refused.

A request is refused if it could never run, if too many wait already, and, where it would rather be refused
than late, if its first token can be expected to come too late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scheduler.config import SchedulerConfig
from scheduler.flight import Flight
from scheduler.live_request import LiveRequest
from scheduler.predictor import StepLatencyModel
from scheduler.roster import Roster
from scheduler.wait import WaitModel

Rejection = Literal["QUEUE_FULL", "CLIENT_LIMIT", "KV_FULL", "SLO_UNATTAINABLE", "DUPLICATE"]


class RejectedError(Exception):
    """A request that cannot be queued; `retry_after`, seconds until it could be, if that is known."""

    def __init__(self, reason: Rejection, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.reason: Rejection = reason
        self.retry_after = retry_after


class Gate:
    """Judges newcomers. It is asked to `check` each of them, and told whenever a step is planned."""

    def __init__(
        self,
        config: SchedulerConfig,
        roster: Roster,
        wait: WaitModel,
        latency: StepLatencyModel,
        flights: Sequence[Flight],
    ) -> None:
        """`flights`: the steps that are under way, kept up to date by the caller."""
        self._config = config
        self._roster = roster
        self._wait = wait
        self._latency = latency
        self._flights = flights
        self._free_starts = 0  # of requests that were let in since the last plan, and need not wait

    def check(self, live: LiveRequest, now: float) -> None:
        """Raises RejectedError unless the request may be queued; the caller queues it.

        Whether it could ever run is asked first: of the reasons to refuse it, a full queue alone will pass.
        """
        self._check_pages(live)
        self._check_room(live)
        if live.request.slo.reject:
            self._check_in_time(live, now)

    def planned(self) -> None:
        """All requests that may start have started, those included that were let in since the last plan."""
        self._free_starts = 0

    def _check_pages(self, live: LiveRequest) -> None:
        """Raises RejectedError for a request that could never run."""
        pages, whose = self._config.num_pages, "there are"
        if self._config.max_client_pages < pages:
            pages, whose = int(self._config.max_client_pages), "a client may have"
        if live.worst_case_pages > pages:
            raise RejectedError(
                "KV_FULL",
                f"the request may need {live.worst_case_pages} KV pages of {self._config.page_size} tokens,"
                f" and {whose} {pages}: lower max_tokens or the number of branches",
            )

    def _check_room(self, live: LiveRequest) -> None:
        """Raises RejectedError where the queue is full, for its client or for everybody."""
        queue = self._roster.queue
        of_client = queue.waiting_of(live.request.client)
        if of_client >= self._config.max_client_queue:
            raise RejectedError("CLIENT_LIMIT", f"{of_client} requests of this client are waiting already")
        if len(queue) >= self._config.max_queue:
            raise RejectedError("QUEUE_FULL", f"{len(queue)} requests are waiting already", self.start_gap)

    def _check_in_time(self, live: LiveRequest, now: float) -> None:
        """Raises RejectedError for a request whose first token would come too late, in all likelihood."""
        roster, ttft = self._roster, live.request.slo.ttft
        running = roster.count_by_client()
        queued = roster.queue.ahead_of(live.request.client, running, self._config.max_client_running)
        unread = sum(len(other.request.prompt) for other in [*queued, *roster.preempted])
        unread += sum(len(other.request.prompt) for other in roster.running if not other.prompt_read)
        ahead = max(0, len(roster.preempted) + len(queued) - self._free_starts)
        at_once = not self._wait.is_blocked and ahead == 0 and roster.may_start(live, queued)
        starts = 0 if at_once else ahead + 1
        own, others = self._wait.reading(len(live.request.prompt)), self._wait.reading(unread)
        gap = self.start_gap
        step = max([0.0, *(flight.end - now for flight in self._flights)]) + self._step_seconds
        expected = step + max(gap * self._wait.longest(starts), others) + own
        if expected > ttft and (starts or unread):  # if nobody is before it, it cannot come sooner
            too_many = starts - self._wait.most_starts((ttft - own - step) / gap)
            retry = max(gap * too_many, others + own + step - ttft, step)
            text = f"the first token would come after about {expected:.3g} s, and the target is {ttft:.3g} s"
            raise RejectedError("SLO_UNATTAINABLE", text, retry)
        self._free_starts += at_once

    @property
    def start_gap(self) -> float:
        """Seconds between two starts while requests wait, as far as that is known."""
        return self._wait.gap(self._guessed_gap)

    def _guessed_gap(self) -> float:
        """As if all were to last as long as they may."""
        running = self._roster.running
        served = [*running, *self._roster.queue][: max(1, len(running) + self._free_starts)]
        longest = sum(live.longest_chain for live in served) or 1
        return self._step_seconds * longest / max(1, len(served)) ** 2

    @property
    def _step_seconds(self) -> float:
        """What a step takes now."""
        return self._flights[-1].forecast.seconds if self._flights else self._latency.rows_seconds(1)
