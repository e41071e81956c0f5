"""When a request's tokens came, and when they are due. Seconds, by the caller's clock."""

from __future__ import annotations

from scheduler.events import Timing
from scheduler.request import Slo
from scheduler.slack import AIM, token_deadline


class Pace:
    """The times of one request.

    arrival      when it was queued; every target of the first token counts from here
    started      when it first left the queue
    first_token  when its first sample came; last_token, when its newest token did
    updated      when its newest sample came
    resumed      when it last started, forked, joined or came back: deadlines look no further back, but
                 measures never restart
    tokens       sampled tokens, over all branches
    """

    __slots__ = (
        "_tokens_before",
        "arrival",
        "first_token",
        "last_token",
        "resumed",
        "slo",
        "started",
        "tokens",
        "updated",
    )

    def __init__(self, slo: Slo, arrival: float) -> None:
        self.slo = slo
        self.arrival = self.last_token = self.updated = self.resumed = arrival
        self.started: float | None = None
        self.first_token: float | None = None
        self.tokens = 0
        self._tokens_before = 0  # when it last resumed

    # --- what happened ---------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """It leaves the queue: for the first time, or again after a preemption."""
        if self.started is None:
            self.started = self.updated = now
        self._resume(now)

    def branch(self) -> None:
        """It forked, or its branches were joined, by the newest sample."""
        self._resume(self.updated)

    def sample(self, now: float) -> bool:
        """A sample came, which may be no token of the answer. Is it the request's first?"""
        self.updated = now
        if self.first_token is not None:
            return False
        self.first_token = self.last_token = now
        return True

    def token(self, now: float) -> None:
        """A token of the answer came."""
        self.last_token = now
        self.tokens += 1

    def _resume(self, now: float) -> None:
        self.resumed = now
        self._tokens_before = self.tokens

    # --- what follows ----------------------------------------------------------------------------------

    @property
    def ttft_deadline(self) -> float:
        return self.arrival + self.slo.ttft

    @property
    def reading_deadline(self) -> float:
        """When what it has to read should be read: the TTFT target, counted anew after a preemption."""
        return (self.arrival if self.first_token is None else self.resumed) + self.slo.ttft

    def next_token(self, repay: float, emission: float | None = None) -> float:
        """When the next token is due, after the last one or the one expected at `emission`.

        `repay`: see scheduler.slack.token_deadline.
        """
        return token_deadline(self.last(emission), self.slo.tpot, self.ahead(emission), repay)

    def last(self, emission: float | None = None) -> float:
        """When the last token came or it resumed; or `emission`."""
        return max(self.last_token, self.resumed) if emission is None else emission

    def ahead(self, emission: float | None = None) -> float:
        """Seconds by which that token came sooner than the pace that it is held to asks for."""
        resumed = max(self.resumed, self.first_token or 0.0)
        tokens = self.tokens - self._tokens_before + (emission is not None)
        return resumed + tokens * AIM * self.slo.tpot - self.last(emission)

    def timing(self) -> Timing:
        """What it came to, once it has ended."""
        first = self.first_token if self.first_token is not None else self.last_token
        started = self.started if self.started is not None else first
        tpot = (self.last_token - first) / (self.tokens - 1) if self.tokens > 1 else 0.0
        return Timing(
            queue=started - self.arrival,
            ttft=first - self.arrival,
            tpot=tpot,
            total=self.updated - self.arrival,
            tpot_slo_met=tpot <= self.slo.tpot,
            ttft_slo_met=first - self.arrival <= self.slo.ttft,
        )
