"""A call, from its arrival to its end: its caller, its id and its messages, which are looked at by size.

Calls in flight are bounded, by client and in all. What is refused learns why; a client that has too many and
does not stop learns it more and more slowly, so that refusing it costs the others nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Set
from typing import Any

import grpc

from serve.reading.work import malformed, parse
from serve.server.callers import Caller, Callers
from serve.server.tokens import Role
from taper_client.errors import InvalidRequestError, OverloadedError, ServiceError, Violation

EXCESSES = (  # reasons that are the client's own doing
    "CLIENT_LIMIT",
    "TOO_MANY_CALLS",
    "NO_TOKEN",
    "WRONG_TOKEN",
    "WRONG_CERTIFICATE",
    "WRONG_ROLE",
)
_AT_ONCE, _A_SECOND = 20, 20.0  # refusals for these reasons: so many at once, then so many a second


class Call:
    """One call, in the task that handles it.

    caller  who makes it, as far as it has been asked
    id      of its request, or one that stands for the call in an error and in the log
    error   with which it was ended from outside
    facts   what the log says of its request, which has come to its end
    server  the name of this server, which is not for strangers
    """

    def __init__(self, context: grpc.aio.ServicerContext, max_bytes: int, server: str = "") -> None:
        self._context, self._max_bytes = context, max_bytes
        self._server, self.server = server, ""
        self._task = asyncio.current_task()
        self.caller = Caller(context.peer())
        self.id = uuid.uuid4().hex
        self.error: ServiceError | None = None
        self.facts: Mapping[str, object] = {}
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it came."""
        return round(time.monotonic() - self._began, 6)

    def identify(self, callers: Callers, roles: Set[Role]) -> None:
        """Ask who makes it. Raises UnauthenticatedError, and PermissionDeniedError for who has none of the
        roles."""
        self.caller = callers.of(self._context)
        self.caller.check(roles)
        self.server = self._server

    def end(self, error: ServiceError) -> None:
        """Let it end with an error, whatever it waits for."""
        if self.error is None and self._task is not None:
            self.error = error
            self._task.cancel()

    async def message(self) -> bytes:
        """What the client has to say. Raises InvalidRequestError if that is nothing, or too much."""
        data = await self._next()
        if data is None:
            raise malformed("a call brings one message")
        return data

    async def read(self, kind: Any) -> Any:
        """Its message, of a kind that is small. Raises InvalidRequestError."""
        return parse(kind, await self.message())

    async def each(self, kind: Any) -> AsyncIterator[Any]:
        """All of its messages, of a kind that is small."""
        while (data := await self._next()) is not None:
            yield parse(kind, data)

    @property
    def is_retried(self) -> bool:
        """Whether the client has made it before, and heard nothing."""
        metadata = self._context.invocation_metadata() or ()
        return any(key == "grpc-previous-rpc-attempts" for key, _ in metadata)

    async def write(self, data: bytes) -> None:
        """No headers go before the first message: they would already keep a client's gRPC from trying the
        call at another server."""
        await self._context.write(data)

    async def _next(self) -> bytes | None:
        data: Any = await self._context.read()
        if not isinstance(data, bytes):  # gRPC's EOF
            return None
        if len(data) > self._max_bytes:
            text = f"the message has {len(data)} bytes, and at most {self._max_bytes} are possible"
            numbers = {"limit": str(self._max_bytes), "got": str(len(data))}
            raise InvalidRequestError.of([Violation("", text)], reason="MESSAGE_TOO_LARGE", metadata=numbers)
        return data


class Calls:
    """The calls of one kind that are in flight: at most `total`, and `per_client` of one client.

    held  calls that wait to be told of their refusal
    """

    def __init__(self, *, total: int, per_client: int) -> None:
        self._total, self._per_client = total, per_client
        self._clients: Counter[str] = Counter()
        self._calls: set[Call] = set()
        self._told: dict[str, float] = {}  # by when all that a client was refused would have been told
        self.held = 0
        self._over = asyncio.Event()

    @contextlib.contextmanager
    def one_more(self, call: Call) -> Iterator[None]:
        """While the call runs. Raises OverloadedError if there are too many."""
        client = call.caller.client
        if self._clients[client] >= self._per_client:
            raise _too_many(self._per_client, "of this client")
        if len(self._calls) >= self._total:
            raise _too_many(self._total, "on this server")
        self._calls.add(call)
        self._clients[client] += 1
        try:
            yield
        finally:
            self._calls.discard(call)
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def of(self, client: str) -> int:
        """How many there are of one client."""
        return self._clients[client]

    async def refuse(self, client: str, error: ServiceError) -> None:
        """Wait for the moment to tell it of a refusal: for its turn, or until all calls are ended."""
        if error.reason not in EXCESSES:
            return
        if error.reason == "TOO_MANY_CALLS" and self._clients[client] < self._per_client:
            return  # those of others are too many
        now = asyncio.get_running_loop().time()
        self._told = {name: told for name, told in self._told.items() if told > now}
        told = self._told[client] = self._told.get(client, now) + 1 / _A_SECOND
        self.held += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, told - now - _AT_ONCE / _A_SECOND)):
                    await self._over.wait()
        finally:
            self.held -= 1

    @property
    def is_empty(self) -> bool:
        """Nobody waits for the end of a call, nor for a refusal."""
        return not self._calls and not self.held

    def end(self, error: ServiceError) -> None:
        """End all of them; what is refused is told at once from now on."""
        self._over.set()
        for call in self._calls:
            call.end(error)


def _too_many(limit: int, where: str) -> OverloadedError:
    error = OverloadedError.because("TOO_MANY_CALLS", f"there are {limit} calls {where} already")
    error.metadata = {"limit": str(limit)}
    return error
