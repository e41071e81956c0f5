"""The server's life: it takes its ports, starts, drains and stops, and says so; its engine may die."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.config import OptionError, ServerConfig
from serve.door import Failed
from serve.served import Served
from serve.server.ports import SERVICES, Ports
from serve.server.server import serve
from serve.server.service import Service
from taper_client import AsyncClient
from taper_client.errors import InternalError, UnavailableError
from taper_client.v1 import control_service_pb2
from tests.serve.fakes import FakeEngine, served_model
from tests.serve.server.own_loop import answer, begin, in_loop, serving, under_way


@in_loop
async def test_it_listens_with_the_largest_limits_that_there_can_be():
    most = 2**29 - 1
    ports = Ports(Service(ServerConfig(port=0, max_message_bytes=most, max_client_calls=most)))
    await ports.stop(0)


@in_loop
async def test_a_second_server_does_not_share_the_port():
    async with serving(FakeEngine()) as (_, address):
        taken = int(address.rpartition(":")[2])
        with pytest.raises(OptionError, match=f"^--port: cannot listen on {address}"):
            Ports(Service(ServerConfig(port=taken)))
        with pytest.raises(OptionError, match=f"^--control-port: cannot listen on {address}"):
            Ports(Service(ServerConfig(port=0, control_port=taken)))
        with pytest.raises(OptionError, match=f"^--metrics-port: cannot listen on {address} for metrics: "):
            await serve(
                ServerConfig(port=0, metrics_port=taken, readers=0), lambda *_: pytest.fail("it is loaded")
            )


async def health(channel: grpc.aio.Channel, service: str = "") -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@in_loop
async def test_a_starting_server_says_so():
    async with (
        serving() as (service, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as client,
    ):
        assert await health(channel) == "NOT_SERVING"
        for call in (client.complete("go"), client.tokenize("go"), client.model_info(), client.load()):
            with pytest.raises(UnavailableError) as caught:
                await call
            assert (caught.value.reason, caught.value.retry_after) == ("STARTING", 1.0)
        info = await client.server_info()
        assert info.state == control_service_pb2.SERVER_STATE_STARTING
        service.serve(Served(engine=FakeEngine(answer), model=served_model()))
        assert [await health(channel, name) for name in ("", *SERVICES)] == ["SERVING"] * 3
        assert (await client.complete("go")).text == "aa"


@in_loop
async def test_a_draining_server_finishes_what_runs_and_takes_nothing_new():
    engine = FakeEngine()
    async with (
        serving(engine) as (service, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as client,
    ):
        running = await under_way(engine, client)
        draining = asyncio.ensure_future(service.drain(30))
        await asyncio.to_thread(engine.drained.wait, 10)
        assert await health(channel) == "NOT_SERVING"
        with pytest.raises(UnavailableError) as caught:
            await client.complete("go")
        assert (caught.value.reason, caught.value.retry_after) == ("DRAINING", 1.0)
        assert (await client.server_info()).state == control_service_pb2.SERVER_STATE_DRAINING
        await asyncio.to_thread(answer, engine, engine.requests["r"])
        assert (await running).text == "aa"
        await draining
        assert (await client.server_info()).state == control_service_pb2.SERVER_STATE_STOPPED


@in_loop
async def test_what_a_drain_could_not_finish_is_told_so():
    engine = FakeEngine()
    async with serving(engine) as (service, address), AsyncClient(address) as client:
        running = await under_way(engine, client)
        await service.drain(0.0)
        with pytest.raises(UnavailableError, match="stopping") as caught:
            await running
        assert (caught.value.reason, caught.value.retry_after) == ("STOPPED", 1.0)


@in_loop
async def test_health_is_watched():
    engine = FakeEngine()
    async with serving(engine) as (service, address), grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICES[0])]
        names = health_pb2.HealthCheckResponse.ServingStatus.Name
        assert [names((await watch.read()).status) for watch in watches] == ["SERVING"] * 2
        await service.drain(0.0)
        assert [names((await watch.read()).status) for watch in watches] == ["NOT_SERVING"] * 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "taper.v1.Unheard")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_when_the_engine_dies_callers_learn_that_and_no_more():
    engine = FakeEngine()
    async with (
        serving(engine) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address) as client,
    ):
        running = await under_way(engine, client)
        engine.state = "FAILED"
        engine.tell("r", *begin(), Failed("Traceback: secret"))
        with pytest.raises(InternalError) as caught:
            await running
        assert (caught.value.request_id, caught.value.reason) == ("r", "ENGINE_FAILED")
        assert caught.value.retry_after is None
        assert "secret" not in str(caught.value)
        assert await health(channel) == "NOT_SERVING"
        with pytest.raises(UnavailableError) as refused:
            await client.complete("go")
        assert (refused.value.reason, refused.value.retry_after) == ("FAILED", 1.0)


@in_loop
async def test_a_bug_is_told_to_the_log_alone(capsys):
    class Broken(FakeEngine):
        def submit(self, request, sink):
            raise KeyError("secret")

    async with serving(Broken()) as (service, address), AsyncClient(address) as client:
        with pytest.raises(InternalError) as caught:
            await client.complete("go", request_id="r")
        assert (caught.value.message, caught.value.request_id) == ("internal error", "r")
        assert service.is_idle
    assert "secret" in capsys.readouterr().out
