"""What a call meets before its message is read: bounds on its size, and on how many there are."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from serve.config import ServerConfig
from serve.door import Load
from serve.server.calls import Calls
from serve.server.ports import MAX_CONTROL_BYTES
from taper_client import AsyncClient, generate_request
from taper_client.errors import DuplicateRequestError, InvalidRequestError, OverloadedError
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.fakes import FakeEngine, begin, finished
from tests.serve.server.own_loop import in_loop, listening_to, until
from tests.serve.server.raw_calls import (
    CHECK,
    CONTROL,
    DETOKENIZE,
    GENERATE,
    TOKENIZE,
    WATCH,
    HeldReaders,
    connection,
    end_of,
    served_by,
    soon,
)

CONTROLS = [
    CONTROL + method.name for method in control_pb.DESCRIPTOR.services_by_name["ControlService"].methods
]


# --- sizes -------------------------------------------------------------------------------------------------


@in_loop
async def test_a_message_may_be_as_large_as_the_limit_and_no_larger():
    prompt = pb.GenerateRequest(prompt=pb.Prompt(text="x" * 994)).SerializeToString()
    assert len(prompt) == 1000
    service = served_by(FakeEngine())
    async with listening_to(service) as address, connection(address) as channel:
        for method in (GENERATE, TOKENIZE, DETOKENIZE):
            make = channel.unary_stream if method == GENERATE else channel.unary_unary
            for data, too_large in ((prompt, False), (prompt + b" ", True), (prompt * 3, True)):
                error = await end_of(make(method)(data))
                assert isinstance(error, InvalidRequestError), method
                assert (error.reason == "MESSAGE_TOO_LARGE") is too_large, method
                if too_large:
                    assert error.metadata == {"limit": "1000", "got": str(len(data))}
                    assert error.violations
        beyond = await end_of(channel.unary_stream(GENERATE)(prompt * 5))
        assert beyond is not None
        assert (beyond.code, beyond.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ""), (
            "gRPC's own, and bare"
        )


@in_loop
@pytest.mark.parametrize("method", [*CONTROLS, CHECK, WATCH])
async def test_a_message_without_a_prompt_is_small(method: str):
    service = served_by(FakeEngine(), ServerConfig(port=0))
    async with listening_to(service) as address, connection(address) as channel:
        make = channel.unary_stream if method == WATCH else channel.unary_unary
        for size, reason in (
            (MAX_CONTROL_BYTES, "INVALID_FIELD"),
            (MAX_CONTROL_BYTES + 2, "MESSAGE_TOO_LARGE"),
        ):
            error = await end_of(make(method)(b"\x78\x01" * (size // 2)))  # fields that nobody knows
            if method in (CHECK, WATCH) and reason == "INVALID_FIELD":
                assert error is None, "gRPC's own messages may have more fields"
                continue
            assert error is not None
            assert error.reason == reason
            assert len(error.violations) <= 20


@in_loop
async def test_compressed_messages_are_not_taken():
    """A few bytes of them could become any number."""
    service = served_by(FakeEngine())
    async with listening_to(service) as address, connection(address) as channel:
        call = channel.unary_unary(CONTROL + "GetLoad")
        error = await end_of(call(b"\x78\x01" * 400, compression=grpc.Compression.Gzip))
        assert error is not None
        assert error.code is grpc.StatusCode.UNIMPLEMENTED


# --- calls in flight ---------------------------------------------------------------------------------------


@in_loop
async def test_calls_in_flight_are_bounded_by_connection_and_in_all():
    engine = FakeEngine()
    service = served_by(engine)
    async with (
        listening_to(service) as address,
        connection(address) as first,
        connection(address) as second,
        AsyncClient(address) as other,
    ):
        running = [
            channel.unary_stream(GENERATE)(generate_request("go", request_id=name).SerializeToString())
            for channel, name in ((first, "a"), (first, "b"), (second, "c"))
        ]
        await until(engine, lambda e: len(e.requests) == 3)
        for channel, limit in ((first, "2"), (second, "3")):
            error = await end_of(channel.unary_stream(GENERATE)(generate_request("go").SerializeToString()))
            assert isinstance(error, OverloadedError)
            assert (error.reason, error.retry_after) == ("TOO_MANY_CALLS", 1.0)
            assert error.metadata == {"limit": limit}
        assert (await other.load()).running_requests == 3, "other methods are counted for themselves"
        running[0].cancel()
        await until(engine, lambda e: e.cancelled == ["a"])
        again = first.unary_stream(GENERATE)(generate_request("go", request_id="d").SerializeToString())
        await until(engine, lambda e: "d" in e.requests)
        again.cancel()


@in_loop
async def test_watchers_are_bounded_and_the_check_goes_on():
    service = served_by(FakeEngine())
    async with listening_to(service) as address, connection(address) as first, connection(address) as second:
        watches = [first.unary_stream(WATCH)(b"") for _ in range(2)]
        for watch in watches:
            assert await watch.read()
        error = await end_of(first.unary_stream(WATCH)(b""))
        assert error is not None
        assert error.reason == "TOO_MANY_CALLS"
        assert await end_of(second.unary_unary(CHECK)(b"")) is None


@in_loop
async def test_of_many_calls_that_come_at_one_moment_grpc_ends_none():
    """Of more than a thousand, it would: at random, whosever they are, and without a reason."""
    service = served_by(FakeEngine(), ServerConfig(port=0, max_calls=3000, max_client_calls=3000))
    async with listening_to(service) as address, connection(address) as channel:
        watches = [channel.unary_stream(WATCH)(b"") for _ in range(2500)]
        assert all([await watch.read() for watch in watches])


# --- refusals that need no prompt --------------------------------------------------------------------------


@in_loop
async def test_what_needs_no_prompt_is_refused_before_one_is_read():
    class Full(FakeEngine):
        queued = 3

        def load(self) -> Load:
            load = super().load()
            return replace(
                load, scheduler=replace(load.scheduler, queued_requests=self.queued), start_gap=2.5
            )

    engine, readers = Full(), HeldReaders()
    service = served_by(engine, ServerConfig(port=0, max_queue=4), readers)
    async with listening_to(service) as address, AsyncClient(address) as client:
        first = asyncio.ensure_future(client.complete("go", request_id="first"))
        await soon(lambda: len(readers.jobs) == 1)
        with pytest.raises(OverloadedError) as caught:
            await client.complete("go")  # three wait, and the first is on its way to them
        assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_FULL", 2.5)
        engine.queued = 0
        with pytest.raises(DuplicateRequestError):
            await client.complete("go", request_id="first")
        with pytest.raises(InvalidRequestError, match="model: this server serves 'tiny', not 'other'"):
            await client.complete("go", model="other")
        assert len(readers.jobs) == 1
        first.cancel()
        await soon(lambda: service.is_idle)


@in_loop
async def test_who_asks_for_too_much_again_and_again_is_told_so_slowly_and_nobody_else_is():
    config, readers = ServerConfig(port=0, max_client_calls=12), HeldReaders()
    service = served_by(FakeEngine(), config, readers)
    message = generate_request("go").SerializeToString()
    async with listening_to(service) as address, connection(address) as one, connection(address) as other:
        held = [channel.unary_stream(GENERATE)(message) for channel in (one, other) for _ in range(12)]
        await soon(lambda: len(readers.jobs) == 24)

        async def refused(channel: grpc.aio.Channel, times: int) -> float:
            began = asyncio.get_running_loop().time()
            errors = [end_of(channel.unary_stream(GENERATE)(message)) for _ in range(times)]
            assert {error and error.reason for error in await asyncio.gather(*errors)} == {"TOO_MANY_CALLS"}
            return asyncio.get_running_loop().time() - began

        assert await refused(one, 20) < 0.95, "the first are told at once"
        assert await refused(one, 35) > 0.7, "then twenty in a second"
        assert await refused(other, 20) < 0.95
        for call in held:
            call.cancel()
        await soon(lambda: service.is_idle)


@in_loop
async def test_ten_thousand_streams_on_one_connection_leave_the_others_theirs():
    engine = FakeEngine()
    service = served_by(engine, ServerConfig(port=0))
    message = generate_request("go").SerializeToString()
    async with listening_to(service) as address, connection(address) as other:
        many = connection(address)
        held = [many.unary_stream(GENERATE)(message) for _ in range(10_000)]
        await soon(lambda: len(engine.requests) == service.config.max_client_calls)
        for _ in range(5):
            began = asyncio.get_running_loop().time()
            assert await end_of(other.unary_unary(CHECK)(b"")) is None
            call = other.unary_stream(GENERATE)(
                generate_request("go", request_id="other").SerializeToString()
            )
            await soon(lambda: "other" in engine.requests)
            engine.tell("other", begin("other", 0), finished("other"))
            assert [message async for message in call]
            assert asyncio.get_running_loop().time() - began < 40.0, "behind them it would be minutes"
            del engine.requests["other"]
        assert len(engine.requests) == service.config.max_client_calls
        await many.close()
        await soon(lambda: service.is_idle and service.inference.is_empty)
        assert all(call.done() for call in held)


@in_loop
async def test_whoever_is_refused_for_the_calls_of_others_is_told_at_once():
    calls = Calls(total=1, per_client=1)
    error = OverloadedError.because("TOO_MANY_CALLS", "those of others")
    async with asyncio.timeout(0.5):
        for _ in range(50):
            await calls.refuse("innocent", error)


@in_loop
async def test_who_has_as_many_requests_as_a_client_may_is_refused_before_one_more_is_read():
    config, readers = ServerConfig(port=0, max_client_queue=1, max_client_running=1), HeldReaders()
    service = served_by(FakeEngine(), config, readers)
    message = generate_request("go").SerializeToString()
    async with listening_to(service) as address, connection(address) as one, connection(address) as other:
        calls = [one.unary_stream(GENERATE)(message) for _ in range(2)]
        await soon(lambda: len(readers.jobs) == 2)
        error = await end_of(one.unary_stream(GENERATE)(message))
        assert error is not None
        assert (error.reason, error.retry_after) == ("CLIENT_LIMIT", 1.0)
        calls += [other.unary_stream(GENERATE)(message)]
        await soon(lambda: len(readers.jobs) == 3)
        for call in calls:
            call.cancel()
        await soon(lambda: service.is_idle)
