"""grpc.health.v1, as load balancers use it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.server.callers import Callers
from serve.server.calls import Calls
from serve.server.health import Health
from serve.server.methods import Method, add_service

Status = health_pb2.HealthCheckResponse


class Server:
    """A health service whose state a test switches."""

    def __init__(self) -> None:
        self.serving = False
        self.looks = 0

    def look(self) -> bool:
        self.looks += 1
        return self.serving

    async def __aenter__(self) -> health_pb2_grpc.HealthStub:
        self._server = grpc.aio.server()
        health = Health(["one"], self.look)
        calls = Calls(total=1000, per_client=1000)
        methods = {"Check": Method(health.check, 1024, calls), "Watch": Method(health.watch, 1024, calls)}
        add_service(self._server, health_pb2, methods, Callers())
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return health_pb2_grpc.HealthStub(self._channel)

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()
        await self._server.stop(0)


def request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_every_service_has_the_servers_own_state():
    async def use() -> None:
        server = Server()
        async with server as stub:
            for state, serving in ((Status.NOT_SERVING, False), (Status.SERVING, True)):
                server.serving = serving
                assert [(await stub.Check(request(name))).status for name in ("", "one")] == [state] * 2

    asyncio.run(use())


def test_a_service_that_does_not_exist_is_not_found():
    async def use() -> None:
        async with Server() as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(request("two"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert (await stub.Watch(request("two")).read()).status == Status.SERVICE_UNKNOWN

    asyncio.run(use())


def test_every_watcher_learns_of_every_change():
    """Watchers of one service do not depend on each other, nor on one that went away."""

    async def use() -> None:
        server = Server()
        async with server as stub:
            watches = [stub.Watch(request()) for _ in range(3)]
            assert [(await watch.read()).status for watch in watches] == [Status.NOT_SERVING] * 3
            watches.pop().cancel()
            server.serving = True
            assert [(await watch.read()).status for watch in watches] == [Status.SERVING] * 2

    asyncio.run(use())


def test_one_look_is_taken_for_all_watchers_and_none_where_there_are_none():
    assert 0.05 <= Health.LOOK <= 1.0, "who looks all the time holds up the server"

    async def use() -> None:
        server = Server()
        async with server as stub:
            watches = [stub.Watch(request()) for _ in range(200)]
            assert {(await watch.read()).status for watch in watches} == {Status.NOT_SERVING}
            await asyncio.sleep(2 * Health.LOOK)  # who has just come is looked after once more
            before = server.looks
            await asyncio.sleep(5 * Health.LOOK)
            assert 1 <= server.looks - before <= 6
            server.serving = True
            assert {(await watch.read()).status for watch in watches} == {Status.SERVING}
            for watch in watches:
                watch.cancel()
            await asyncio.sleep(2 * Health.LOOK)
            before = server.looks
            await asyncio.sleep(3 * Health.LOOK)
            assert server.looks == before

    asyncio.run(use())


def test_a_watcher_is_told_of_changes_alone(monkeypatch):
    monkeypatch.setattr(Health, "LOOK", 0.001)

    async def use() -> None:
        server = Server()
        async with server as stub:
            watch = stub.Watch(request())
            told = []
            for serving in (False, True, False):
                server.serving = serving
                told.append((await watch.read()).status)
                looks = server.looks
                while server.looks < looks + 5:
                    await asyncio.sleep(0.001)
            assert told == [Status.NOT_SERVING, Status.SERVING, Status.NOT_SERVING]

    asyncio.run(use())
