"""A reader's process as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
from typing import Any

from serve.processes import start_process
from serve.reading.frames import LENGTH, Begin, Ready, Told, pack
from serve.reading.work import Job

_MAIN = "serve.reading.child.main"


class GoneError(Exception):
    """The process has ended. `aborted`: by itself, which is what it does without memory."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a reader's process ended with {status}")
        self.aborted = status == -signal.SIGABRT


class ReaderProcess:
    """One process that reads, used from the event loop by one task at a time."""

    def __init__(self) -> None:
        self._process, self._end = start_process(_MAIN)
        self._end.setblocking(False)

    async def begin(self, begin: Begin) -> None:
        """Until it can read. Raises GoneError."""
        await self._send(begin)
        ready = await self._receive()
        assert isinstance(ready, Ready)

    async def ask(self, job: Job) -> Told:
        """Raises GoneError. If this is cancelled, only `end` may follow."""
        await self._send(job)
        return await self._receive()

    async def end(self) -> None:
        """Kill it, whatever it is at."""
        self._end.close()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    async def _send(self, message: Begin | Job) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._end, pack(message))
        except OSError:
            await self._gone()

    async def _receive(self) -> Any:
        (size,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        return pickle.loads(await self._exactly(size))

    async def _exactly(self, size: int) -> bytearray:
        data, got = bytearray(size), 0
        view = memoryview(data)
        while got < size:
            count = 0
            with contextlib.suppress(OSError):
                count = await asyncio.get_running_loop().sock_recv_into(self._end, view[got:])
            if not count:
                await self._gone()
            got += count
        return data

    async def _gone(self) -> None:
        raise GoneError(await asyncio.to_thread(self._process.wait))
