"""Calls without a stub or a client's checks, and a small server that reads their messages when it is let."""

from __future__ import annotations

import asyncio

import grpc

from serve.config import ServerConfig
from serve.door import Engine
from serve.reading.work import Job, ReadHere
from serve.served import Served
from serve.server.service import Service
from taper_client.errors import ServiceError, from_rpc
from tests.serve.fakes import served_model

GENERATE, TOKENIZE, DETOKENIZE = (
    f"/taper.v1.InferenceService/{name}" for name in ("Generate", "Tokenize", "Detokenize")
)
CONTROL = "/taper.v1.ControlService/"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
SMALL = ServerConfig(port=0, max_calls=3, max_client_calls=2, max_message_bytes=1000, max_queue=4)
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


class HeldReaders(ReadHere):
    """Read when they are let."""

    def __init__(self) -> None:
        super().__init__(served_model())
        self.go_on = asyncio.Event()
        self.jobs: list[Job] = []

    def read(self, job: Job, connection: str) -> asyncio.Future:
        self.jobs.append(job)
        return asyncio.ensure_future(self._read(job, connection))

    async def _read(self, job: Job, connection: str):
        await self.go_on.wait()
        return await super().read(job, connection)


def served_by(engine: Engine, config: ServerConfig = SMALL, readers: ReadHere | None = None) -> Service:
    service = Service(config)
    service.serve(Served(engine=engine, model=served_model()), readers)
    return service


def connection(address: str) -> grpc.aio.Channel:
    """One that is shared with no other channel."""
    return grpc.aio.insecure_channel(address, options=UNLIMITED)


async def end_of(call: grpc.aio.Call) -> ServiceError | None:
    """How a call without a stub ends; None: well."""
    try:
        await (call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    except grpc.aio.AioRpcError as error:
        return from_rpc(error)
    return None


async def soon(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)
