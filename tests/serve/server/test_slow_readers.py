"""Readers that fall behind, or ask for fewer messages: the same text, as long as they read at all."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scheduler.events import TokenEmitted
from scheduler.step import Sample
from taper_client import AsyncClient, generate_request
from taper_client.answer import Completion
from taper_client.errors import OverloadedError, from_rpc
from taper_client.events import events_of
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc
from tests.serve.fakes import FakeEngine, finished
from tests.serve.server.own_loop import answer, begin, connected, in_loop, serving, token, under_way, until


@in_loop
async def test_an_interval_is_in_milliseconds_outside_and_in_seconds_inside():
    engine, intervals = FakeEngine(answer), []
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        open_stream = service.open

        def noted(request, caller, *, interval: float = 0.0):
            intervals.append(interval)
            return open_stream(request, caller, interval=interval)

        service.open = noted
        await client.complete("go", interval_ms=250.0)
    assert intervals == [0.25]


@in_loop
async def test_a_reader_that_falls_behind_gets_fewer_messages_and_the_same_text():
    engine = FakeEngine()
    async with serving(engine) as (service, address), grpc.aio.insecure_channel(address) as channel:
        call = inference_grpc.InferenceServiceStub(channel).Generate(generate_request("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin())
        for count in range(1, 1001):  # all before the loop turns once: this is the loop's thread
            engine.tell("r", token(count))
        engine.tell("r", finished("r", 1000))
        messages = [message async for message in call]
        assert len(messages) < 10
        assert "".join(event.delta.text for m in messages for event in m.events) == "a" * 1000
        assert service.is_idle


@in_loop
async def test_a_reader_with_an_interval_gets_fewer_messages_and_the_same_answer():
    """The interval is longer than the test may take: the last message does not wait for it."""
    engine = FakeEngine()
    async with (
        serving(engine) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as other,
    ):
        counts, answers = [], []
        for name, interval in (("each", 0.0), ("few", 60_000.0)):
            message = generate_request("go", request_id=name, interval_ms=interval)
            call = inference_grpc.InferenceServiceStub(channel).Generate(message)
            await until(engine, lambda e, name=name: name in e.requests)
            steps = [[token(count, name)] for count in range(1, 11)]
            for step in (begin(name), *steps, [finished(name, 10)]):
                engine.tell(name, *step)
                await other.load()  # the loop turns
            messages = [message async for message in call]
            completion = Completion()
            for event in (event for message in messages for event in events_of(message)):
                completion.add(event)
            counts.append(len(messages))
            answers.append((completion.text, completion.trunk.completion_tokens, completion.usage))
        assert counts[1] == 2 < counts[0]
        assert answers[0] == answers[1]
        assert answers[0][:2] == ("a" * 10, 10)


@in_loop
async def test_a_reader_that_does_not_read_is_given_up():
    engine = FakeEngine()
    async with connected(engine, waiting_events=100) as client:
        running = await under_way(engine, client)
        engine.tell("r", *begin(), *(token(count) for count in range(1, 200)))
        with pytest.raises(OverloadedError) as caught:
            await running
        assert (caught.value.reason, caught.value.retry_after) == ("SLOW_CONSUMER", None)
        await until(engine, lambda e: "r" in e.cancelled)


@in_loop
@pytest.mark.parametrize(("reads", "steps"), [(True, 100), (False, 1000)])
async def test_a_full_socket_counts_as_not_reading(reads, steps):
    """gRPC's own buffers are bounded: what a client leaves unread ends up waiting in the server."""
    engine = FakeEngine()
    async with (
        serving(engine, waiting_events=1000) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        message = generate_request("go", request_id="r", logprobs=True, top_logprobs=8)
        call = inference_grpc.InferenceServiceStub(channel).Generate(message)
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin())
        await call.read()
        reader = asyncio.ensure_future(drain(call)) if reads else None
        sample = Sample(97, -1.0, ((1, -2.0),) * 64)
        async with AsyncClient(address) as other:
            for step in range(steps):
                if engine.cancelled:
                    break
                engine.tell("r", *(TokenEmitted("r", 0, sample, 40 * step + i) for i in range(40)))
                await other.load()
        assert bool(engine.cancelled) is not reads
        if reader is not None:
            engine.tell("r", finished("r"))
            await reader
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drain(call)
            assert from_rpc(caught.value).reason == "SLOW_CONSUMER"


async def drain(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
    if await call.code() is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata()
        )
