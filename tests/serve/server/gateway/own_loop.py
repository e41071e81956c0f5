"""A server that gateways reach, in the loop of a test, and what its engine says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as vllm_grpc

from scheduler.events import StageFinished, Started
from scheduler.request import Request
from scheduler.stopping import FinishReason
from serve.config import ServerConfig
from serve.served import Platform, Served
from serve.server.ports import Ports
from serve.server.server import shut_down
from serve.server.service import Service
from serve.server.tls import Certificates
from tests.serve.fakes import FakeEngine, begin, finished, say, served_model

CONFIG = ServerConfig(port=0, gateway_port=0)


def answer(engine: FakeEngine, request: Request) -> None:
    """Two tokens in two steps."""
    name = request.id
    end = StageFinished(name, 0, 0, FinishReason.MAX_TOKENS, None, 2, True)
    engine.tell(name, Started(name, 1, 0), begin(name, 0), *say(name, 0, "a"))
    engine.tell(name, *say(name, 0, "b", 2), end, finished(name, 2))


@contextlib.asynccontextmanager
async def opened(
    engine: FakeEngine | None = None,
    config: ServerConfig = CONFIG,
    certificates: Certificates | None = None,
    **model: Any,
) -> AsyncIterator[tuple[Service, Ports, Any]]:
    """A server whose model is loaded if there is an engine, and a gateway's stub of it."""
    service = Service(config)
    if engine is not None:
        serve(service, engine, **model)
    ports = Ports(service, certificates)
    await ports.start()
    assert ports.gateway is not None
    try:
        async with grpc.aio.insecure_channel(ports.gateway) as channel:
            yield service, ports, vllm_grpc.VllmEngineStub(channel)
    finally:
        await shut_down(ports, service, timeout=0.0)


def serve(service: Service, engine: FakeEngine, **model: Any) -> None:
    platform = Platform(page_size=16, largest_bucket=64)
    service.serve(Served(engine=engine, model=served_model(**model), platform=platform))
