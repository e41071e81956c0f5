"""A few processes that read messages: whoever takes too long is ended, and the others go on.

A message costs what its sender likes: a chat template may loop, a text may be long. So reading has limits of
time and memory, its callers wait in turns, and none of them can occupy every reader.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import structlog

from serve.reading.child import too_costly
from serve.reading.fair import FairQueue
from serve.reading.frames import Begin, Told
from serve.reading.process import GoneError, ReaderProcess
from serve.reading.work import Answer, Job
from taper_client.errors import InternalError, OverloadedError, ServiceError

log = structlog.get_logger("taper")

ROOM = 1 << 26  # bytes of the messages that wait to be read
LEAST = 1 << 16  # bytes that each of them counts as at the least
_AGAIN = 1.0  # seconds until a reader that cannot start is started again


@dataclass(eq=False, slots=True)
class _Waiting:
    job: Job
    answer: asyncio.Future[Answer]
    tries: int = field(default=0)


class ReaderPool:
    """Reads in processes of their own; made and used in one event loop, whose thread lasts.

    size     readers; half of them may read for one client at a time
    seconds  that one message may take
    """

    def __init__(self, *, size: int, seconds: float) -> None:
        self._seconds = seconds
        self._queue: FairQueue[_Waiting] = FairQueue(share=max(1, size // 2), room=ROOM)
        self._processes: list[ReaderProcess | None] = [ReaderProcess() for _ in range(size)]
        self._tasks: list[asyncio.Task[None]] = []
        self._begin: Begin | None = None

    async def begin(self, begin: Begin) -> None:
        """Until all of them can read. Raises RuntimeError if one cannot."""
        self._begin = begin
        try:
            await asyncio.gather(*(process.begin(begin) for process in self._processes if process))
        except GoneError as error:
            raise RuntimeError(f"{error}: it could not get ready to read messages") from error
        self._tasks = [
            asyncio.create_task(self._work(place), name=f"taper-reader-{place}")
            for place in range(len(self._processes))
        ]

    def read(self, job: Job, client: str) -> asyncio.Future[Answer]:
        """`Readers.read`."""
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._put(client, waiting)
        return waiting.answer

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in self._processes if process))
        self._processes = []

    async def _work(self, place: int) -> None:
        """One reader after the other, at the same place."""
        process = self._processes[place] or await self._started(place)
        while True:
            client, waiting = await self._queue.take()
            try:
                if not waiting.answer.done() and not await self._read(process, waiting):
                    self._processes[place] = None
                    await process.end()
                    # Until there is another, the client counts as being read: it used this one up.
                    process = await self._started(place)
            finally:
                self._queue.done(client)
            if not waiting.answer.done():
                self._put(client, waiting)

    async def _read(self, process: ReaderProcess, waiting: _Waiting) -> bool:
        """Have one message read; returns whether the process can go on. A message whose reader ended without
        a word may be read once more: it may be innocent."""
        waiting.tries += 1
        try:
            async with asyncio.timeout(self._seconds):
                told = await process.ask(waiting.job)
        except TimeoutError:
            log.warning("a message took too long to read", request_id=waiting.job.id, seconds=self._seconds)
            _settle(waiting, too_costly("time"))
            return False
        except GoneError as gone:
            log.error("a reader ended", error=str(gone), request_id=waiting.job.id)
            if gone.aborted:
                _settle(waiting, too_costly("memory"))
            elif waiting.tries > 1:
                _settle(waiting, InternalError("internal error"))
            return False
        self._tell(waiting, told)
        return not told.leaves

    def _tell(self, waiting: _Waiting, told: Told) -> None:
        if told.bug:
            log.error("bug", method=waiting.job.method, request_id=waiting.job.id, exception=told.bug)
        _settle(waiting, InternalError("internal error") if told.outcome is None else told.outcome)

    def _put(self, client: str, waiting: _Waiting) -> None:
        for left_out in self._queue.put(client, waiting, max(len(waiting.job.data), LEAST)):
            full = OverloadedError.because("QUEUE_FULL", "too many messages are waiting to be read")
            _settle(left_out, full)

    async def _started(self, place: int) -> ReaderProcess:
        """A new reader. Where none can start, another is tried a little later."""
        assert self._begin is not None
        while True:
            process = self._processes[place] = ReaderProcess()
            with contextlib.suppress(GoneError):
                await process.begin(self._begin)
                return process
            self._processes[place] = None
            await process.end()
            log.error("a reader could not start")
            await asyncio.sleep(_AGAIN)


def _settle(waiting: _Waiting, outcome: Answer | ServiceError) -> None:
    if waiting.answer.done():  # its caller has left
        return
    if isinstance(outcome, ServiceError):
        waiting.answer.set_exception(outcome)
    else:
        waiting.answer.set_result(outcome)
