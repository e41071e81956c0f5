"""The bounded mailbox between the engine's thread and one request's gRPC call.

The engine never waits for a reader. What a reader has not taken yet waits here, and is taken all at once;
when it grows past the bound, the request is given up: a reader that slow would hold memory without end. A
reader that asked for an interval is not even woken by the steps in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from scheduler.events import Event, Finished
from serve.door import Failed, News, Refused
from taper_client.errors import OverloadedError, ServiceError


class Doorbell:
    """Calls functions in the event loop, from any thread: it is woken once for all that wait, since a step
    has news for every request."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], object]] = deque()
        self._rung = False

    def ring(self, call: Callable[[], object]) -> None:
        """Call in the loop soon. After the loop has gone, there is nobody to tell."""
        self._waiting.append(call)
        if not self._rung and not self._loop.is_closed():
            self._rung = True
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # before looking: who rings from now on wakes the loop again
        while self._waiting:
            self._waiting.popleft()()


class Stream:
    """Events of one request. `put` is called from any thread, all else from the event loop's.

    doorbell       brings what was put to the event loop
    bound          most events that wait
    on_overflow    called once when there are more; what waits is dropped and `take` raises SLOW_CONSUMER
    explain        the error that `take` raises when the engine does not take the request, or gives it up
    interval       least seconds between two returns of `take`, unless the request has ended or half of
                   `bound` waits
    """

    def __init__(
        self,
        doorbell: Doorbell,
        *,
        bound: int,
        on_overflow: Callable[[], object],
        explain: Callable[[Refused | Failed], ServiceError],
        interval: float = 0.0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._doorbell = doorbell
        self._bound = bound
        self._on_overflow = on_overflow
        self._explain = explain
        self._interval = interval
        self._due = 0.0  # when `take` may return, by the loop's clock
        self._waiting: list[Event] = []
        self._error: ServiceError | None = None
        self.given_up = False  # by the engine, which knows the request no more
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()  # what waits should not wait until it is due

    def put(self, news: Sequence[News]) -> None:
        """Add what is new, at least one piece."""
        self._doorbell.ring(partial(self._add, news))

    def end(self, error: ServiceError) -> None:
        """Let `take` raise `error` after what waits already; the first error counts."""
        if self._error is None:
            self._error = error
            self._news.set()
            self._urgent.set()

    async def take(self) -> list[Event]:
        """Everything that waits, at least one event. Raises the ServiceError that ended the stream."""
        if self._error is None and self._loop.time() < self._due:
            await self._pause()
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        events, self._waiting = self._waiting, []
        self._urgent.clear()
        self._due = self._loop.time() + self._interval
        return events

    async def _pause(self) -> None:
        """Until the next events are due, or urgent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._due):
                await self._urgent.wait()

    def _add(self, news: Sequence[News]) -> None:
        last = news[-1]
        if isinstance(last, Refused | Failed):
            self.given_up = True
        if self._error is not None:
            return
        for piece in news:
            if isinstance(piece, Refused | Failed):
                self.end(self._explain(piece))
            else:
                self._waiting.append(piece)
        if len(self._waiting) > self._bound:
            self._waiting.clear()
            self.end(
                OverloadedError.because(
                    "SLOW_CONSUMER",
                    f"more than {self._bound} events were waiting to be read: read faster, or ask for fewer"
                    " messages with output.interval_ms",
                )
            )
            self._on_overflow()
        self._news.set()
        if 2 * len(self._waiting) >= self._bound or isinstance(last, Finished):
            self._urgent.set()
