"""Messages on their way: a few of each connection at a time, and others may wait until they have come."""

from __future__ import annotations

import asyncio
import contextlib

from serve.server.arrivals import AT_ONCE, Arrivals


def test_a_few_messages_of_each_connection_come_at_a_time() -> None:
    async def use() -> None:
        arrivals, coming = Arrivals(), []
        go_on = asyncio.Event()

        async def come(connection: str) -> None:
            async with arrivals.one_more(connection):
                coming.append(connection)
                await go_on.wait()

        calls = [asyncio.ensure_future(come(name)) for name in ["a"] * (AT_ONCE + 1) + ["b"]]
        await asyncio.sleep(0)
        assert sorted(coming) == ["a"] * AT_ONCE + ["b"]
        calls[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calls[0]
        await asyncio.sleep(0)
        assert sorted(coming) == ["a"] * (AT_ONCE + 1) + ["b"], "who leaves makes room"
        go_on.set()
        await asyncio.gather(*calls[1:])

    asyncio.run(use())


def test_who_waits_for_what_is_here_does_not_wait_for_what_comes_later() -> None:
    async def use() -> None:
        arrivals = Arrivals()
        await arrivals.all_here(10)
        first, second = arrivals.one_more("a"), arrivals.one_more("a")
        await first.__aenter__()
        waiting = asyncio.ensure_future(arrivals.all_here(10))
        await asyncio.sleep(0)
        await second.__aenter__()
        assert not waiting.done()
        await first.__aexit__(None, None, None)
        await waiting
        await arrivals.all_here(0.001)  # not for longer than it may
        await second.__aexit__(None, None, None)

    asyncio.run(use())
