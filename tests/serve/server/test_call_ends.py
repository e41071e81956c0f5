"""Each end of a call has a status and a reason: no message, an abort, a drain, or a bug of the server."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from serve.config import ServerConfig
from serve.served import Served
from serve.server.service import Service
from taper_client import AsyncClient, generate_request
from taper_client.errors import (
    CancelledError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
    from_rpc,
)
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.fakes import FakeEngine, served_model
from tests.serve.server.own_loop import answer, in_loop, listening_to
from tests.serve.server.raw_calls import (
    CHECK,
    CONTROL,
    GENERATE,
    TOKENIZE,
    WATCH,
    HeldReaders,
    connection,
    end_of,
    served_by,
    soon,
)

# --- what is no message ------------------------------------------------------------------------------------


@in_loop
@pytest.mark.parametrize(
    "method",
    [*(CONTROL + name for name in ("GetLoad", "Abort", "SetPolicy")), GENERATE, TOKENIZE, CHECK, WATCH],
)
@pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x0a\x02\xff\xfe", b"\x1b" * 200])
async def test_bytes_that_are_no_message_are_an_invalid_argument_with_details(method: str, data: bytes):
    service = served_by(FakeEngine())
    async with listening_to(service) as address, connection(address) as channel:
        make = channel.unary_stream if method in (GENERATE, WATCH) else channel.unary_unary
        error = await end_of(make(method)(data))
        if method == CONTROL + "GetLoad" and error is not None and error.reason == "INVALID_FIELD":
            return  # it knows no field: what has no text need not be UTF-8
        assert isinstance(error, InvalidRequestError)
        assert error.reason == "MALFORMED"
        assert error.violations


@in_loop
async def test_a_call_without_a_message_is_told_that_it_needs_one():
    service = served_by(FakeEngine())
    async with listening_to(service) as address, connection(address) as channel:
        for method in (GENERATE, CHECK, CONTROL + "GetLoad"):
            call = channel.stream_stream(method)()
            await call.done_writing()
            assert await _code_and_reason(call) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED"), method


# --- ids, aborts and drains --------------------------------------------------------------------------------


@in_loop
async def test_a_call_whose_message_is_being_read_can_be_aborted():
    engine, readers = FakeEngine(), HeldReaders()
    service = served_by(engine, readers=readers)
    async with listening_to(service) as address, AsyncClient(address) as client:
        running = asyncio.ensure_future(client.complete("go", request_id="r"))
        await soon(lambda: readers.jobs)
        assert await client.abort("r", "unknown") == ("r",)
        with pytest.raises(CancelledError) as caught:
            await running
        assert (caught.value.reason, caught.value.request_id) == ("ABORTED", "r")
        assert service.is_idle
        assert not engine.requests


@in_loop
async def test_an_abort_right_after_its_call_always_finds_it():
    """Long messages are overtaken by short ones: the abort waits for those that came before it."""
    service = served_by(FakeEngine(), ServerConfig(port=0), HeldReaders())
    chance = random.Random(0)
    async with listening_to(service) as address, connection(address) as channel:
        generate, abort = channel.unary_stream(GENERATE), channel.unary_unary(CONTROL + "Abort")
        for number in range(100):
            name, length = f"r{number}", chance.choice([1, 10_000, 1_000_000])
            message = generate_request("go", request_id=name).SerializeToString()
            call = generate(message + pb.GenerateRequest(cache_salt="x" * length).SerializeToString())
            answered = await abort(control_pb.AbortRequest(request_ids=[name]).SerializeToString())
            assert list(control_pb.AbortResponse.FromString(answered).aborted_request_ids) == [name], length
            error = await end_of(call)
            assert isinstance(error, CancelledError)
            assert (error.reason, error.request_id) == ("ABORTED", name)
        assert service.is_idle


@in_loop
async def test_an_id_is_one_call_s_from_its_arrival():
    engine, readers = FakeEngine(answer), HeldReaders()
    service = served_by(engine, readers=readers)
    async with listening_to(service) as address, AsyncClient(address) as client:
        first = asyncio.ensure_future(client.complete("go", request_id="r"))
        await soon(lambda: readers.jobs)
        with pytest.raises(DuplicateRequestError):
            await client.complete("go", request_id="r")
        readers.go_on.set()
        assert (await first).text == "aa"


@in_loop
async def test_a_drain_tells_every_call_that_the_server_stops():
    """One that is being read, one whose message never comes, a watch, and one that describes services."""
    readers = HeldReaders()
    service = served_by(FakeEngine(), ServerConfig(port=0), readers)
    async with listening_to(service) as address:
        channel = connection(address)
        reading = channel.unary_stream(GENERATE)(generate_request("go").SerializeToString())
        silent = [channel.stream_stream(method)() for method in (GENERATE, CONTROL + "Abort")]
        described = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
        watch = channel.unary_stream(WATCH)(b"")
        assert await watch.read()
        await soon(lambda: readers.jobs)
        for call in (*silent, described):
            await call.wait_for_connection()
        await asyncio.sleep(0.05)
        ends = [
            asyncio.ensure_future(_code_and_reason(call)) for call in (reading, *silent, described, watch)
        ]
    for end in ends:
        assert await end == (grpc.StatusCode.UNAVAILABLE, "STOPPED")
    await channel.close()


@in_loop
async def test_a_server_that_stops_tells_those_that_wait_for_a_refusal():
    service = served_by(FakeEngine(), ServerConfig(port=0, max_calls=600, max_client_calls=300))
    async with listening_to(service) as address:
        channel = connection(address)
        watches = [channel.unary_stream(WATCH)(b"") for _ in range(300)]
        assert all([await watch.read() for watch in watches])  # or some that come later might overtake them
        watches += [channel.unary_stream(WATCH)(b"") for _ in range(700)]
        ends = [asyncio.ensure_future(_code_and_reason(watch)) for watch in watches]
        await soon(lambda: service.control.held + sum(end.done() for end in ends) == 700)
    assert {await end for end in ends[:300]} == {(grpc.StatusCode.UNAVAILABLE, "STOPPED")}
    assert {await end for end in ends[300:]} == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")}
    await channel.close()


async def _code_and_reason(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    trailing = await call.trailing_metadata()
    error = grpc.aio.AioRpcError(await call.code(), await call.initial_metadata(), trailing)
    return error.code(), from_rpc(error).reason


@in_loop
async def test_who_reaches_a_server_that_stops_is_told_so():
    readers = HeldReaders()
    service = served_by(FakeEngine(), readers=readers)
    async with listening_to(service) as address, AsyncClient(address) as client:
        reading = asyncio.ensure_future(client.tokenize("go"))
        await soon(lambda: readers.jobs)
        await service.drain(0.0)
        with pytest.raises(UnavailableError) as caught:
            await reading
        assert caught.value.reason == "STOPPED"


# --- bugs --------------------------------------------------------------------------------------------------


@in_loop
@pytest.mark.parametrize("name", ["", "given"])
async def test_an_internal_error_has_the_id_that_the_log_has(name: str, capsys: pytest.CaptureFixture[str]):
    class Broken(FakeEngine):
        def submit(self, request, sink):
            raise KeyError("x")

    async with listening_to(served_by(Broken())) as address, AsyncClient(address) as client:
        with pytest.raises(InternalError) as caught:
            await client.complete("go", request_id=name or None)
    assert caught.value.request_id
    assert name in ("", caught.value.request_id)
    assert caught.value.request_id in capsys.readouterr().out


@in_loop
async def test_a_bug_of_any_method_has_an_id(capsys: pytest.CaptureFixture[str]):
    class Broken(FakeEngine):
        def load(self):
            raise KeyError("x")

    service = Service(ServerConfig(port=0))
    async with listening_to(service) as address, AsyncClient(address) as client:
        service.serve(Served(engine=Broken(), model=served_model()))
        with pytest.raises(InternalError) as caught:
            await client.load()
    assert caught.value.request_id in capsys.readouterr().out
