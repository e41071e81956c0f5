"""Each way to a server gives its messages, and a refusal is no measurement."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from bench.host.asking import by_grpc, count
from bench.host.gateways import answered, by_engine_service, by_http
from tests.serve.fakes import FakeEngine
from tests.serve.server.gateway.own_loop import answer, opened
from tests.serve.server.own_loop import in_loop

EVENTS = (b'data: {"choices": []}\n\n', b'data: {"choices": []}\n\n', b"data: [DONE]\n\n")


async def http(status: str) -> tuple[asyncio.Server, int]:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        chunks = b"".join(f"{len(event):x}\r\n".encode() + event + b"\r\n" for event in EVENTS)
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks)
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


@in_loop
async def test_server_sent_events_are_counted_but_for_the_last() -> None:
    server, port = await http("200 OK")
    async with server:
        assert await count(by_http(port, "tiny")(2)) == 2


@in_loop
async def test_a_gateway_that_has_no_server_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.host.gateways.PATIENCE", 0.0)
    server, port = await http("404 Not Found")
    async with server:
        with pytest.raises(RuntimeError, match="404 Not Found"):
            await answered(by_http(port, "tiny"))


@in_loop
async def test_both_services_give_their_messages() -> None:
    """One for each of two steps, or for both if they come at one moment; engines, one for the end."""
    async with (
        opened(FakeEngine(answer)) as (_, ports, _),
        grpc.aio.insecure_channel(ports.address) as plain,
        grpc.aio.insecure_channel(str(ports.gateway)) as engine,
    ):
        assert await count(by_grpc(plain)(2)) in (1, 2)
        assert await count(by_engine_service(engine)(2)) in (2, 3)
