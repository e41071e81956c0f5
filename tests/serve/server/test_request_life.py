"""A request's life: a message a step to its last event, or to its cancellation, deadline or abort."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scheduler.events import TokenEmitted, WidthChanged
from scheduler.step import Sample
from taper_client import AsyncClient, generate_request
from taper_client.errors import CancelledError, DeadlineExceededError
from taper_client.events import Finished
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc
from tests.serve.fakes import FakeEngine, finished
from tests.serve.server.own_loop import answer, begin, connected, in_loop, serving, token, under_way, until


@in_loop
async def test_a_step_is_a_message():
    engine = FakeEngine()
    async with serving(engine) as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = inference_grpc.InferenceServiceStub(channel).Generate(generate_request("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        kinds = []
        for step in ([*begin(), token(1)], [token(2), WidthChanged("r", 1, 3), token(3)], [finished("r")]):
            engine.tell("r", *step)
            message = await call.read()
            kinds.append([event.WhichOneof("kind") for event in message.events])
        assert kinds == [["started", "stage_started", "delta"], ["delta", "width_changed"], ["finished"]]
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
    assert engine.cancelled == [], "what ended by itself is not cancelled"


@in_loop
async def test_a_cancelled_call_cancels_its_request():
    engine = FakeEngine()
    async with connected(engine) as client:
        stream = client.generate("go", request_id="r")
        events = aiter(stream)
        first = asyncio.ensure_future(anext(events))
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin())
        await first
        stream.cancel()
        await until(engine, lambda e: e.cancelled == ["r"])
        with pytest.raises(CancelledError):
            async for _ in events:
                pass


@in_loop
async def test_a_call_cancelled_in_the_queue_cancels_its_request():
    engine = FakeEngine()
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        waiting = await under_way(engine, client)
        waiting.cancel()
        await until(engine, lambda e: e.cancelled == ["r"])
        with pytest.raises(asyncio.CancelledError):
            await waiting
    value, name = service.metrics.registry.get_sample_value, "taper_requests_total"
    assert value(name, {"code": "CANCELLED", "tenant": ""}) == 1
    assert value(name, {"code": "OK", "tenant": ""}) is None


@in_loop
async def test_a_deadline_cancels_the_request():
    engine = FakeEngine()
    async with connected(engine) as client:
        with pytest.raises(DeadlineExceededError):
            await client.complete("go", request_id="r", timeout=0.2)
        await until(engine, lambda e: e.cancelled == ["r"])


@in_loop
async def test_abort_ends_exactly_the_calls_that_it_names():
    engine = FakeEngine()
    async with connected(engine) as client:
        calls = {
            name: asyncio.ensure_future(client.complete("go", request_id=name)) for name in ("r1", "r10")
        }
        await until(engine, lambda e: len(e.requests) == 2)
        assert await client.abort("r1", "r", "unknown", "r1") == ("r1",)
        with pytest.raises(CancelledError) as caught:
            await calls["r1"]
        assert (caught.value.reason, caught.value.request_id) == ("ABORTED", "r1")
        assert caught.value.retry_after is None
        await asyncio.to_thread(answer, engine, engine.requests["r10"])
        assert (await calls["r10"]).text == "aa"
        assert await client.abort("r1") == ()
    assert set(engine.cancelled) == {"r1"}


@in_loop
async def test_special_tokens_are_shown_when_they_are_wanted():
    def special(engine: FakeEngine, request) -> None:
        engine.tell(request.id, *begin(request.id), TokenEmitted(request.id, 0, Sample(257), 1))
        engine.tell(request.id, finished(request.id))

    async with connected(FakeEngine(special)) as client:
        assert (await client.complete("go")).text == ""
        assert (await client.complete("go", keep_special_tokens=True)).text == "<begin>"


@in_loop
async def test_an_id_can_be_used_again_after_its_request():
    engine = FakeEngine(answer)
    async with connected(engine) as client:
        for _ in range(2):
            assert (await client.complete("go", request_id="r")).text == "aa"


def test_finished_is_the_clients_last_event():
    engine = FakeEngine(answer)

    async def use() -> list:
        async with connected(engine) as client:
            return [event async for event in client.generate("go")]

    assert isinstance(asyncio.run(use())[-1], Finished)
