"""Connections take turns, and who has most waiting is the first to be turned away."""

from __future__ import annotations

import asyncio

from serve.reading.fair import FairQueue


def run(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_connections_take_turns_and_each_keeps_its_order() -> None:
    async def use() -> None:
        queue: FairQueue[str] = FairQueue(share=9, room=100)
        for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
            assert queue.put(item[0], item, 1) == []
        assert len(queue) == 6
        assert [(await queue.take())[1] for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
        assert len(queue) == 0

    run(use())


def test_a_connection_has_no_more_at_work_than_its_share() -> None:
    async def use() -> None:
        queue: FairQueue[str] = FairQueue(share=1, room=100)
        for item in ("a1", "a2", "b1"):
            queue.put(item[0], item, 1)
        assert [await queue.take(), await queue.take()] == [("a", "a1"), ("b", "b1")]
        waiting = asyncio.ensure_future(queue.take())
        await asyncio.sleep(0)
        assert not waiting.done(), "its share is at work"
        queue.done("a")
        assert await waiting == ("a", "a2")

    run(use())


def test_what_waits_for_an_item_gets_one_that_comes_later() -> None:
    async def use() -> None:
        queue: FairQueue[str] = FairQueue(share=1, room=100)
        waiting = [asyncio.ensure_future(queue.take()) for _ in range(2)]
        await asyncio.sleep(0)
        queue.put("a", "a1", 1)
        queue.put("b", "b1", 1)
        assert await asyncio.gather(*waiting) == [("a", "a1"), ("b", "b1")]

    run(use())


def test_at_the_limit_all_have_room_and_beyond_it_the_newest_of_the_heaviest_is_dropped() -> None:
    queue: FairQueue[str] = FairQueue(share=1, room=10)
    assert queue.put("a", "a1", 4) == []
    assert queue.put("a", "a2", 4) == []
    assert queue.put("b", "b1", 2) == [], "just as much as there is room for"
    assert queue.put("b", "b2", 1) == ["a2"], "another connection has more"
    assert queue.put("a", "a3", 8) == ["a3"], "itself"
    assert len(queue) == 3
