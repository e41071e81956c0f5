"""The mailbox between the engine and a call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine

import pytest

from scheduler.events import Event, WidthChanged
from serve.door import Failed
from serve.server.stream import Doorbell, Stream
from taper_client.errors import CancelledError, InternalError, OverloadedError
from tests.serve.fakes import finished

EVENTS = [WidthChanged("r", width, 9) for width in range(9)]


def stream(bound: int = 5, overflows: list | None = None, interval: float = 0.0) -> Stream:
    told = [] if overflows is None else overflows
    return Stream(
        Doorbell(),
        bound=bound,
        on_overflow=lambda: told.append(1),
        explain=lambda failed: InternalError(failed.error),
        interval=interval,
    )


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its clock begins at 100 s and jumps to the next timer instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        select = self._selector.select

        def jump(timeout: float | None = None):
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def run(test: Coroutine) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(test)


def now() -> float:
    """Seconds since the start."""
    return round(asyncio.get_running_loop().time() - 100, 6)


async def step(box: Stream, *events: Event | Failed) -> None:
    """A step of 0.1 s ends with these events."""
    await asyncio.sleep(0.1)
    box.put(events)
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def begun(*, bound: int = 5, interval: float) -> Stream:
    """A stream whose first event was taken 0.1 s after the start."""
    box = stream(bound, interval=interval)
    await step(box, EVENTS[0])
    assert await box.take() == EVENTS[:1]
    return box


def test_a_slow_reader_takes_several_steps_at_once():
    async def use() -> None:
        box = stream()
        box.put(EVENTS[:2])
        box.put(EVENTS[2:5])
        await asyncio.sleep(0)
        assert await box.take() == EVENTS[:5], "just as many as the bound"
        box.put(EVENTS[5:6])
        assert await box.take() == EVENTS[5:6]

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
        with pytest.raises(OverloadedError, match="more than 5 events") as caught:
            await box.take()
        assert (caught.value.reason, caught.value.retry_after) == ("SLOW_CONSUMER", None)
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


def test_a_reader_with_an_interval_takes_at_once_what_came_in_it():
    """The first and the last do not wait."""

    async def use() -> None:
        box, taken = stream(bound=100, interval=0.33), []

        async def steps() -> None:
            for event in (*EVENTS, finished("r")):
                await step(box, event)

        stepping = asyncio.ensure_future(steps())
        while sum(count for _, count in taken) < 10:
            events = await box.take()
            taken.append((now(), len(events)))
        assert taken == [(0.1, 1), (0.43, 3), (0.76, 3), (1.0, 3)]
        await stepping

    run(use())


def test_an_end_that_comes_with_other_events_does_not_wait_either():
    async def use() -> None:
        box = await begun(bound=100, interval=5.0)
        taking = asyncio.ensure_future(box.take())
        await step(box, EVENTS[1], finished("r"))
        assert (taking.done(), now()) == (True, 0.2)
        assert len(await taking) == 2

    run(use())


def test_what_comes_after_the_interval_does_not_wait():
    async def use() -> None:
        box = await begun(interval=0.05)
        taking = asyncio.ensure_future(box.take())
        await step(box, EVENTS[1])
        assert (taking.done(), now()) == (True, 0.2)

    run(use())


def test_events_of_a_step_do_not_wake_a_reader_that_waits_for_its_time():
    async def use() -> None:
        box = await begun(bound=1000, interval=60.0)
        taking = asyncio.ensure_future(box.take())
        await asyncio.sleep(0)
        loop, calls = asyncio.get_running_loop(), []
        call_soon = loop.call_soon
        loop.call_soon = lambda call, *args, **more: calls.append(call) or call_soon(call, *args, **more)
        for _ in range(100):
            box._add(EVENTS[:1])
        assert calls == []
        assert (len(await taking), now()) == (100, 60.1)

    run(use())


@pytest.mark.parametrize(
    "last", [[finished("r")], EVENTS[2:5], [EVENTS[2], Failed("it broke")]], ids=["end", "half", "failure"]
)
def test_an_end_and_half_of_the_bound_do_not_wait(last):
    async def use() -> None:
        box = await begun(bound=8, interval=60.0)
        taking = asyncio.ensure_future(box.take())
        await step(box, EVENTS[1])
        assert not taking.done()
        await step(box, *last)
        assert (taking.done(), now()) == (True, 0.3)
        assert await taking == [EVENTS[1], *(event for event in last if not isinstance(event, Failed))]
        if isinstance(last[-1], Failed):
            with pytest.raises(InternalError, match="it broke"):
                await box.take()
            assert now() == 0.3

    run(use())


def test_a_reader_that_was_hurried_once_waits_again():
    async def use() -> None:
        box = await begun(bound=8, interval=60.0)
        await step(box, *EVENTS[1:5])
        assert (await box.take(), now()) == (EVENTS[1:5], 0.2)
        await step(box, EVENTS[5])
        assert (await box.take(), now()) == (EVENTS[5:6], 60.2)

    run(use())


@pytest.mark.parametrize(
    ("leave", "error"),
    [
        (lambda box, taking: box.end(CancelledError("aborted")), CancelledError),
        (lambda box, taking: taking.cancel(), asyncio.CancelledError),
    ],
    ids=["aborted", "cancelled"],
)
@pytest.mark.parametrize("interval", [0.0, 60.0])
def test_a_reader_that_is_ended_or_leaves_does_not_wait_for_its_time(leave, error, interval):
    async def use() -> None:
        box = await begun(interval=interval)
        taking = asyncio.ensure_future(box.take())
        await asyncio.sleep(0)
        leave(box, taking)
        with pytest.raises(error):
            await taking
        assert now() == 0.1

    run(use())


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
