"""The bounded mailbox between the engine's thread and one request's gRPC call.

The engine never waits for a reader. What a reader has not taken yet waits here, and is taken all at once;
when it grows past the bound, the request is given up: a reader that slow would hold memory without end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from scheduler.events import Event
from serve.engine import Failed
from serve.errors import OverloadedError, ServiceError


class Stream:
    """Events of one request. `put` is called from any thread, all else from the event loop's.

    bound          most events that wait
    on_overflow    called once when there are more; what waits is dropped and `take` raises SLOW_CONSUMER
    explain        the error that `take` raises when the engine gives the request up
    """

    def __init__(
        self, *, bound: int, on_overflow: Callable[[], object], explain: Callable[[Failed], ServiceError]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound = bound
        self._on_overflow = on_overflow
        self._explain = explain
        self._waiting: list[Event] = []
        self._error: ServiceError | None = None
        self._news = asyncio.Event()

    def put(self, events: Sequence[Event | Failed]) -> None:
        """Add a step's events. After the event loop has gone, there is nobody to tell."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._add, events)

    def end(self, error: ServiceError) -> None:
        """Let `take` raise `error` after what waits already; the first error counts."""
        if self._error is None:
            self._error = error
            self._news.set()

    async def take(self) -> list[Event]:
        """Everything that waits, at least one event. Raises the ServiceError that ended the stream."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        events, self._waiting = self._waiting, []
        return events

    def _add(self, events: Sequence[Event | Failed]) -> None:
        if self._error is not None:
            return
        for event in events:
            if isinstance(event, Failed):
                self.end(self._explain(event))
            else:
                self._waiting.append(event)
        if len(self._waiting) > self._bound:
            self._waiting.clear()
            self.end(
                OverloadedError(
                    f"more than {self._bound} events were waiting to be read",
                    reason="SLOW_CONSUMER",
                    retry_after=1.0,
                )
            )
            self._on_overflow()
        self._news.set()
