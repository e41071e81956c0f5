"""A Python client in which branches come first.

    with Client("127.0.0.1:50051") as client:
        answer = client.complete("Tea or coffee?", plan=[parallel(["Tea:", "Coffee:"]), serial("So:")])

`generate` streams what happens as the events of `answer`, `complete` collects them. What is wrong with an
argument is a TypeError or a ValueError, other failures are the exceptions of `errors`. `AsyncClient` is
the same with `await`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Unpack

import grpc

from .answer import Completion
from .arguments import seconds
from .credentials import Access, Tls, Token
from .errors import CancelledError, ServiceError
from .events import Event, Started, events_of
from .options import Options
from .request import (
    Prompt,
    abort_request,
    detokenize_request,
    generate_request,
    policy_request,
    tokenize_request,
)
from .v1 import control_service_pb2 as control_pb
from .v1 import control_service_pb2_grpc as control_grpc
from .v1 import inference_service_pb2_grpc as inference_grpc

# `complete` shows only the end, and that never waits: few messages are enough, and cost the server less. Not
# none: a reader that does not read any more should be noticed before the end.
_COMPLETE_INTERVAL_MS = 200.0


class Stream:
    """The events of a running request. Leaving the `with` block, or `cancel`, ends it on the server too.

    server   which server answers, by the name that it has for itself; empty until the first event
    """

    def __init__(self, call: Any, explained: Callable[[Any], ServiceError]) -> None:
        self._call, self._explained = call, explained
        self.server = ""

    def __iter__(self) -> Iterator[Event]:
        try:
            for response in self._call:
                for event in events_of(response):
                    self.server = event.server if isinstance(event, Started) else self.server
                    yield event
        except grpc.RpcError as error:
            raise self._explained(error).by(self.server) from None
        finally:
            self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; harmless when it has ended."""
        self._call.cancel()


class AsyncStream:
    """`Stream` for asyncio."""

    def __init__(self, call: Any, explained: Callable[[Any], ServiceError]) -> None:
        self._call, self._explained = call, explained
        self.server = ""

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for response in self._call:
                for event in events_of(response):
                    self.server = event.server if isinstance(event, Started) else self.server
                    yield event
        except grpc.RpcError as error:
            raise self._explained(error).by(self.server) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._call.cancelled() and not (task and task.cancelling()):
                raise CancelledError("cancelled by the caller") from None
            raise
        finally:
            self.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; harmless when it has ended."""
        self._call.cancel()


class _Connection:
    """A channel to one server, its methods, and the timeout of its calls: what both clients have."""

    _grpc: Any  # the module whose channel it is: `grpc` or `grpc.aio`
    _ask: Callable[[Any, Any], Any]  # what a method that streams nothing answers

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        *,
        timeout: float | None = None,
        tls: Tls | bool | None = None,
        token: Token | None = None,
        plaintext_token: bool = False,
    ) -> None:
        self._access = Access(address, tls, token, plaintext_token)
        self._timeout = seconds("timeout", timeout)
        self._channel = self._access.channel(self._grpc)
        self._inference = inference_grpc.InferenceServiceStub(self._channel)
        self._control = control_grpc.ControlServiceStub(self._channel)
        self._closed = False

    def _start(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """The call of a method, with the client's own timeout unless there is another."""
        limit = seconds("timeout", timeout) or self._timeout
        if self._closed:
            raise RuntimeError("the client is closed: call it inside its `with` block, or make another one")
        return method(request, timeout=limit, metadata=self._access.metadata())

    def _ask_one(self, method: Any, request: Any) -> Any:
        """As `_ask`, about one server. Raises ValueError where there are several."""
        if len(self._access.addresses) > 1:
            raise ValueError("this is about one server: ask each of them by a client of its own address")
        return self._ask(method, request)


class Client(_Connection):
    """A blocking client of a server, or of several that are alike. Thread-safe.

    address   host:port; a target as gRPC writes them, such as unix:/path; or several numeric addresses. Calls
              are spread over all servers that serve, also over those that one name leads to
    timeout   seconds after which a call ends with DeadlineExceededError; None waits as long as it takes
    tls       encrypt the connection; `Tls` says whom to trust, if not whom the system trusts
    token     a bearer token, or what returns one for each call, such as `token_file(path)`
    plaintext_token   send the token without TLS, too, to where others could read it on its way
    """

    _grpc = grpc

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs, and the connection; the client cannot be used any more."""
        self._closed = True
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Start a request and stream its events; `timeout` in seconds is its deadline."""
        request = generate_request(prompt, **options)
        return Stream(self._start(self._inference.Generate, request, timeout), self._access.explained)

    def complete(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Run a request to its end."""
        options.setdefault("interval_ms", _COMPLETE_INTERVAL_MS)
        completion = Completion()
        for event in self.generate(prompt, timeout=timeout, **options):
            completion.add(event)
        return completion

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The ids that the server reads for a prompt."""
        return list(self._ask(self._inference.Tokenize, tokenize_request(prompt)).token_ids)

    def detokenize(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of token ids."""
        request = detokenize_request(ids, keep_special_tokens)
        return self._ask(self._inference.Detokenize, request).text

    def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests from outside of their calls; returns the ids that were running."""
        return tuple(self._ask_one(self._control.Abort, abort_request(request_ids)).aborted_request_ids)

    def set_policy(self, policy: str) -> str:
        """Switch the admission policy (off, cap:N, eager, taper, taper:OPTION); returns the one until now."""
        return self._ask_one(self._control.SetPolicy, policy_request(policy)).previous_policy

    def model_info(self) -> control_pb.GetModelInfoResponse:
        """Which model is served, and the limits that depend on it. Raises ServiceError."""
        return self._ask(self._control.GetModelInfo, control_pb.GetModelInfoRequest())

    def server_info(self) -> control_pb.GetServerInfoResponse:
        """What runs there, in which state, under which policy. Raises ServiceError."""
        return self._ask_one(self._control.GetServerInfo, control_pb.GetServerInfoRequest())

    def load(self) -> control_pb.GetLoadResponse:
        """How busy it is. Raises ServiceError."""
        return self._ask_one(self._control.GetLoad, control_pb.GetLoadRequest())

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return self._start(method, request)
        except grpc.RpcError as error:
            raise self._access.explained(error) from None


class AsyncClient(_Connection):
    """`Client` for asyncio."""

    _grpc = grpc.aio

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End what still runs, and the connection; the client cannot be used any more."""
        self._closed = True
        await self._channel.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Start a request and stream its events; `timeout` in seconds is its deadline."""
        request = generate_request(prompt, **options)
        return AsyncStream(self._start(self._inference.Generate, request, timeout), self._access.explained)

    async def complete(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Run a request to its end."""
        options.setdefault("interval_ms", _COMPLETE_INTERVAL_MS)
        completion = Completion()
        async for event in self.generate(prompt, timeout=timeout, **options):
            completion.add(event)
        return completion

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """The ids that the server reads for a prompt."""
        return list((await self._ask(self._inference.Tokenize, tokenize_request(prompt))).token_ids)

    async def detokenize(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of token ids."""
        request = detokenize_request(ids, keep_special_tokens)
        return (await self._ask(self._inference.Detokenize, request)).text

    async def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests from outside of their calls; returns the ids that were running."""
        answered = await self._ask_one(self._control.Abort, abort_request(request_ids))
        return tuple(answered.aborted_request_ids)

    async def set_policy(self, policy: str) -> str:
        """Switch the admission policy (off, cap:N, eager, taper, taper:OPTION); returns the one until now."""
        return (await self._ask_one(self._control.SetPolicy, policy_request(policy))).previous_policy

    async def model_info(self) -> control_pb.GetModelInfoResponse:
        """Which model is served, and the limits that depend on it. Raises ServiceError."""
        return await self._ask(self._control.GetModelInfo, control_pb.GetModelInfoRequest())

    async def server_info(self) -> control_pb.GetServerInfoResponse:
        """What runs there, in which state, under which policy. Raises ServiceError."""
        return await self._ask_one(self._control.GetServerInfo, control_pb.GetServerInfoRequest())

    async def load(self) -> control_pb.GetLoadResponse:
        """How busy it is. Raises ServiceError."""
        return await self._ask_one(self._control.GetLoad, control_pb.GetLoadRequest())

    async def _ask(self, method: Any, request: Any) -> Any:
        try:
            return await self._start(method, request)
        except grpc.RpcError as error:
            raise self._access.explained(error) from None
