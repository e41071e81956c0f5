"""What calls share: one state of the server, one way to wake the loop, one memory of spelled tokens."""

from __future__ import annotations

import asyncio
import threading

import pytest

from scheduler.program import Plan, SerialStage
from scheduler.request import Request
from scheduler.stopping import Stopping
from serve.config import ServerConfig
from serve.door import Refused
from serve.served import Served
from serve.server.callers import Caller
from serve.server.service import Service
from taper_client.errors import CancelledError, DuplicateRequestError, OverloadedError, UnavailableError
from tests.serve.fakes import FakeEngine, begin, finished, say, served_model

SOMEBODY = Caller("ipv4:127.0.0.1:1")


def service(engine: FakeEngine) -> Service:
    made = Service(ServerConfig())
    made.serve(Served(engine=engine, model=served_model()))
    return made


def request(id: str) -> Request:
    return Request(id=id, prompt=(1,), program=Plan(stages=(SerialStage(stopping=Stopping(max_tokens=1)),)))


def test_a_drain_takes_nothing_new_even_before_the_engine_knows_of_it() -> None:
    class Late(FakeEngine):
        """Has not come to its stop yet."""

        def stop(self, *, drain: bool, timeout: float) -> None:
            stopping.set()
            go_on.wait(10)
            super().stop(drain=drain, timeout=timeout)

    stopping, go_on = threading.Event(), threading.Event()

    async def use() -> None:
        shared = service(Late())
        draining = asyncio.ensure_future(shared.drain(10.0))
        await asyncio.to_thread(stopping.wait, 10)
        try:
            assert shared.state == "DRAINING"
            with pytest.raises(UnavailableError) as caught:
                shared.open(request("r"), SOMEBODY)
            assert caught.value.reason == "DRAINING"
        finally:
            go_on.set()
        await draining
        assert shared.state == "STOPPED"

    asyncio.run(use())


def test_a_drain_ends_every_stream_whatever_its_engine_says() -> None:
    class Silent(FakeEngine):
        """Tells nobody that it stops."""

        def stop(self, *, drain: bool, timeout: float) -> None:
            told.append((drain, timeout))

    told: list[tuple[bool, float]] = []

    async def use() -> None:
        shared = service(Silent())
        streams = [shared.open(request(name), SOMEBODY) for name in "ab"]
        await shared.drain(7.0)
        for stream in streams:
            with pytest.raises(UnavailableError) as caught:
                await stream.take()
            assert (caught.value.reason, caught.value.retry_after) == ("STOPPED", 1.0)

    asyncio.run(use())
    assert told == [(True, 7.0)]


def test_a_server_that_is_stopped_before_it_serves_is_not_starting_any_more() -> None:
    shared = Service(ServerConfig())
    assert shared.state == "STARTING"
    asyncio.run(shared.drain(1.0))
    assert shared.state == "DRAINING"


def test_a_step_wakes_the_loop_once_for_all_requests() -> None:
    async def use() -> None:
        engine = FakeEngine()
        shared = service(engine)
        streams = {name: shared.open(request(name), SOMEBODY) for name in ("a", "b", "c")}
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda call, *more, **context: (
            woken.append(call) or wake(call, *more, **context)
        )
        for name in streams:
            engine.tell(name, *say(name, 0, "x"))
        assert [len(await stream.take()) for stream in streams.values()] == [1, 1, 1]
        assert len(woken) == 1

    asyncio.run(use())


def test_what_one_request_spelled_is_remembered_for_the_next() -> None:
    shared = service(FakeEngine())
    for skip in (True, False):
        assert shared.speller(skip_special_tokens=skip) is shared.speller(skip_special_tokens=skip)
    assert shared.speller(skip_special_tokens=True).text([257]) == ""
    assert shared.speller(skip_special_tokens=False).text([257]) == "<begin>"


def test_an_id_that_was_refused_is_free_and_one_that_runs_is_not() -> None:
    async def use() -> None:
        engine = FakeEngine()
        shared = service(engine)
        engine.refusal = Refused("QUEUE_FULL", "not now")
        stream = shared.open(request("r"), SOMEBODY)
        with pytest.raises(OverloadedError, match="not now"):
            await stream.take()
        shared.close("r", SOMEBODY, finished=False)
        assert shared.is_idle
        assert not engine.cancelled, "who was never taken is not cancelled"
        engine.refusal = None
        stream = shared.open(request("r"), SOMEBODY)
        with pytest.raises(DuplicateRequestError):
            shared.open(request("r"), SOMEBODY)
        engine.tell("r", begin("r", 0), finished("r"))
        assert len(await stream.take()) == 2
        shared.close("r", SOMEBODY, finished=True)
        assert (shared.is_idle, engine.cancelled) == (True, [])

    asyncio.run(use())


def test_an_abort_stops_the_request_at_once_and_its_call_is_told() -> None:
    async def use() -> None:
        engine = FakeEngine()
        shared = service(engine)
        stream = shared.open(request("r"), SOMEBODY)
        assert await shared.abort_each(["r", "another"], SOMEBODY) == ["r"]
        assert engine.cancelled == ["r"], "before its call comes to its turn"
        with pytest.raises(CancelledError) as caught:
            await stream.take()
        assert caught.value.reason == "ABORTED"

    asyncio.run(use())
