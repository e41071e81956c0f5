"""The mailbox between the engine and a call."""

from __future__ import annotations

import asyncio
import threading

import pytest

from scheduler.events import WidthChanged
from serve.engine import Failed
from serve.errors import CancelledError, InternalError, OverloadedError
from serve.stream import Doorbell, Stream

EVENTS = [WidthChanged("r", width, 9) for width in range(9)]


def stream(bound: int = 5, overflows: list | None = None) -> Stream:
    told = [] if overflows is None else overflows
    return Stream(
        Doorbell(),
        bound=bound,
        on_overflow=lambda: told.append(1),
        explain=lambda failed: InternalError(failed.error),
    )


def test_a_slow_reader_takes_several_steps_at_once():
    async def use() -> None:
        box = stream()
        box.put(EVENTS[:2])
        box.put(EVENTS[2:3])
        await asyncio.sleep(0)
        assert await box.take() == EVENTS[:3]
        box.put(EVENTS[3:4])
        assert await box.take() == EVENTS[3:4]

    asyncio.run(use())


def test_a_waiting_reader_is_woken_from_another_thread():
    async def use() -> None:
        box = stream()
        taking = asyncio.ensure_future(box.take())
        await asyncio.sleep(0)
        thread = threading.Thread(target=box.put, args=(EVENTS[:1],))
        thread.start()
        assert await taking == EVENTS[:1]
        thread.join()

    asyncio.run(use())


def test_too_much_waiting_ends_the_request_once():
    async def use() -> None:
        overflows: list[int] = []
        box = stream(overflows=overflows)
        box.put(EVENTS[:5])
        box.put(EVENTS[5:6])
        box.put(EVENTS)
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="more than 5 events"):
            await box.take()
        assert overflows == [1]

    asyncio.run(use())


def test_what_came_before_the_end_is_still_taken():
    async def use() -> None:
        box = stream()
        box.put([EVENTS[0], Failed("it broke")])
        box.put(EVENTS[1:2])
        await asyncio.sleep(0)
        box.end(CancelledError("later"))
        assert await box.take() == EVENTS[:1]
        with pytest.raises(InternalError, match="it broke"):
            await box.take()

    asyncio.run(use())


def test_events_after_the_loop_has_gone_are_nobodys():
    async def use() -> Stream:
        return stream()

    asyncio.run(use()).put(EVENTS)


def test_the_loop_is_woken_once_for_all_streams():
    async def use() -> None:
        woken: list[object] = []
        loop, doorbell, told = asyncio.get_running_loop(), Doorbell(), []
        wake = loop.call_soon_threadsafe

        def counted(call, *arguments):
            woken.append(call)
            return wake(call, *arguments)

        loop.call_soon_threadsafe = counted
        for number in range(20):
            doorbell.ring(lambda number=number: told.append(number))
        await asyncio.sleep(0)
        assert (len(woken), told) == (1, [*range(20)])
        doorbell.ring(lambda: doorbell.ring(lambda: told.append(-1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert told[-1] == -1

    asyncio.run(use())


def test_nothing_that_threads_ring_for_is_lost():
    async def use() -> None:
        doorbell, told = Doorbell(), []
        threads = [
            threading.Thread(target=lambda: [doorbell.ring(lambda: told.append(1)) for _ in range(5000)])
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(told) == 15_000

    asyncio.run(use())
