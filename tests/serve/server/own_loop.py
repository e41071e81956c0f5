"""A server in the loop of a test, and what its engine says: two tokens, or what the test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine

from scheduler.events import BranchInfo, StageStarted, Started, TokenEmitted
from scheduler.step import Sample
from serve.config import ServerConfig
from serve.served import Platform, Served
from serve.server.ports import Ports
from serve.server.server import shut_down
from serve.server.service import Service
from taper_client import AsyncClient
from tests.serve.fakes import FakeEngine, finished, served_model

CONFIG = ServerConfig(port=0)


def in_loop(test: Callable[..., Coroutine]) -> Callable:
    """A test that is a coroutine, as pytest runs it: in a loop of its own."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 300))  # of a test that hangs

    return run


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine | None = None, **options: int) -> AsyncIterator[tuple[Service, str]]:
    """A server, with an engine or still without one, and its address."""
    service = Service(CONFIG, **options)
    if engine is not None:
        service.serve(
            Served(engine=engine, model=served_model(), platform=Platform(device="fake", devices=3))
        )
    async with listening_to(service) as address:
        yield service, address


@contextlib.asynccontextmanager
async def listening_to(service: Service) -> AsyncIterator[str]:
    """The address of a server in this loop."""
    ports = Ports(service)
    await ports.start()
    try:
        yield ports.address
    finally:
        await shut_down(ports, service, timeout=0.0)


@contextlib.asynccontextmanager
async def connected(engine: FakeEngine, **options: int) -> AsyncIterator[AsyncClient]:
    """A client of such a server."""
    async with serving(engine, **options) as (_, address), AsyncClient(address) as client:
        yield client


async def until(engine: FakeEngine, condition: Callable[[FakeEngine], bool]) -> None:
    """Wait until this is so of the engine, while the loop goes on."""
    await asyncio.to_thread(engine.wait_for, condition)


async def under_way(engine: FakeEngine, client: AsyncClient) -> asyncio.Future:
    """The answer to "r", which the client has asked for and the engine has taken."""
    asked = asyncio.ensure_future(client.complete("go", request_id="r"))
    await until(engine, lambda e: "r" in e.requests)
    return asked


def begin(name: str = "r") -> list:
    """A request has started, with a stage of its trunk alone."""
    return [Started(name, 3, 1), StageStarted(name, 0, (BranchInfo(0, 0, ""),))]


def token(count: int, name: str = "r") -> TokenEmitted:
    """The trunk's token of this number, an "a"."""
    return TokenEmitted(name, 0, Sample(ord("a")), count)


def answer(engine: FakeEngine, request) -> None:
    """Two tokens in two steps."""
    engine.tell(request.id, *begin(request.id), token(1, request.id))
    engine.tell(request.id, token(2, request.id), finished(request.id, 2))
