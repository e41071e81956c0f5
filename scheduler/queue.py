"""The requests that wait to start, and whose turn it is.

Clients take turns: the next to start is the oldest request of the client that has the fewest running; of two
with as many, of the one whose last turn is longer ago. Requests that can still meet their TTFT target go
before those that cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from scheduler.live_request import LiveRequest

_Line = dict[LiveRequest, None]  # in the order of arrival


class StartQueue:
    """Waiting requests, in the order of their arrival. To ask for the next takes O(clients)."""

    def __init__(self) -> None:
        self._arrival: dict[LiveRequest, int] = {}
        self._arrivals = 0
        self._of_client = Counter[str]()
        self.picky = 0  # those that would rather be refused than late
        self._last_turn: dict[str, int] = {}  # of clients of whom more requests wait
        self._turns = 0
        self._on_time: dict[str, _Line] = {}  # by client
        self._missed: dict[str, _Line] = {}

    def __len__(self) -> int:
        return len(self._arrival)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._arrival)

    def waiting_of(self, client: str) -> int:
        """How many of a client's requests wait."""
        return self._of_client[client]

    def ahead_of(self, client: str, running: Mapping[str, int], most: float) -> list[LiveRequest]:
        """Those that start before the next request of this client would, if nothing that runs ends before.

        `running`, `most`: as in `next`. Clients take turns, so the many requests of one are not ahead of the
        few of another, and those that it may not run yet are ahead of nobody's.
        """
        own = self._of_client[client]
        turn = running.get(client, 0) + own
        room: dict[str, float] = {}
        for other in self._of_client:
            runs = running.get(other, 0)
            first = other != client and (own > 0 or not self._last_turn.get(other))  # of two whose turn it is
            room[other] = min(turn + first, most) - runs
        ahead: list[LiveRequest] = []
        for live in self._arrival:
            if room[live.request.client] > 0:
                room[live.request.client] -= 1
                ahead.append(live)
        return ahead

    def append(self, live: LiveRequest) -> None:
        client = live.request.client
        self._arrival[live] = self._arrivals
        self._arrivals += 1
        self._of_client[client] += 1
        self.picky += live.request.slo.reject
        self._on_time.setdefault(client, {})[live] = None

    def start(self, live: LiveRequest) -> None:
        """It was its client's turn, and it waits no more; it may have waited elsewhere."""
        self.discard(live)
        self._turns += 1
        if self._of_client[live.request.client]:
            self._last_turn[live.request.client] = self._turns

    def discard(self, live: LiveRequest) -> None:
        """It waits no more, if it did."""
        if self._arrival.pop(live, None) is None:
            return
        client = live.request.client
        self._of_client[client] -= 1
        self.picky -= live.request.slo.reject
        if not self._of_client[client]:
            del self._of_client[client]
            self._last_turn.pop(client, None)
        for lines in (self._on_time, self._missed):
            if live in lines.get(client, ()):
                del lines[client][live]
                if not lines[client]:
                    del lines[client]

    def next(
        self,
        running: Mapping[str, int],
        is_within: Callable[[LiveRequest], bool],
        can_make_it: Callable[[LiveRequest], bool],
        *,
        missed_first: bool,
    ) -> LiveRequest | None:
        """The request whose turn it is; None if none may start.

        running       how many requests of each client run
        is_within     whether its client stays within its limits if it starts; else, others have their turn
        can_make_it   whether a request that starts now can meet its TTFT target: if not, it never will
        missed_first  let one that has missed its target go first, this once
        """
        for line in [*self._on_time.values()]:
            while line and not can_make_it(first := next(iter(line))):
                self._give_up(first)
        on_time, missed = (self._first(lines, running, is_within) for lines in (self._on_time, self._missed))
        return (missed or on_time) if missed_first else (on_time or missed)

    def _give_up(self, live: LiveRequest) -> None:
        """It has missed its target."""
        client = live.request.client
        line = self._on_time[client]
        del line[live]
        if not line:
            del self._on_time[client]
        self._missed.setdefault(client, {})[live] = None

    def _first(
        self,
        lines: Mapping[str, _Line],
        running: Mapping[str, int],
        is_within: Callable[[LiveRequest], bool],
    ) -> LiveRequest | None:
        may_start = [live for line in lines.values() if is_within(live := next(iter(line)))]

        def turn(live: LiveRequest) -> tuple[int, int, int]:
            client = live.request.client
            return running.get(client, 0), self._last_turn.get(client, 0), self._arrival[live]

        return min(may_start, key=turn, default=None)
