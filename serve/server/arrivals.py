"""Messages with prompts on their way here: known while they come, and a few of each connection at a time.

gRPC takes only a little of a message until it is asked for it, so that what is not asked for yet costs
its sender memory, and not the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from serve.reading.memory import give_back
from serve.server.calls import Call

AT_ONCE = 8  # messages of one connection
LARGE = 1 << 20  # bytes of a message whose memory is given back to the system
_TRIM_SECONDS = 1.0  # after the last of such messages


@dataclass(slots=True)
class _Gate:
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    calls: int = 0


class Arrivals:
    """The calls whose message has not come yet. Used in one event loop."""

    def __init__(self) -> None:
        self._here: set[asyncio.Future[None]] = set()
        self._gates: dict[str, _Gate] = {}
        self._trim: asyncio.TimerHandle | None = None

    async def message(self, call: Call) -> bytes:
        """Of a call that brings a prompt. Raises InvalidRequestError."""
        async with self.one_more(call.caller.connection):
            data = await call.message()
        self.came(len(data))
        return data

    @contextlib.asynccontextmanager
    async def one_more(self, connection: str) -> AsyncIterator[None]:
        """While the message of a call is waited for; it has its turn among those of its connection."""
        here = asyncio.get_running_loop().create_future()
        self._here.add(here)
        gate = self._gates.setdefault(connection, _Gate())
        gate.calls += 1
        try:
            async with gate.turns:
                yield
        finally:
            gate.calls -= 1
            if not gate.calls:
                del self._gates[connection]
            self._here.discard(here)
            here.cancel()

    async def all_here(self, timeout: float) -> None:
        """Until the messages of the calls that are here by now have come; for up to `timeout` seconds."""
        if self._here:
            await asyncio.wait(set(self._here), timeout=timeout)

    def came(self, size: int) -> None:
        """A message of so many bytes has come. Those of large ones would be kept for others of their size."""
        if size >= LARGE:
            if self._trim is not None:
                self._trim.cancel()
            self._trim = asyncio.get_running_loop().call_later(_TRIM_SECONDS, self._give_back)

    def _give_back(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, give_back)
