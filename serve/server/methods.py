"""gRPC's handlers of the services' methods: bytes in and bytes out, and every end has a status.

They are not those of the generated stubs, which would parse a message, whatever its size, in the event loop
and before anybody has looked at it; and what they raise there ends without a reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.message import Message

from serve.server.callers import Callers
from serve.server.calls import Call, Calls
from serve.server.tokens import ROLES, Role
from taper_client.errors import DuplicateRequestError, InternalError, ServiceError, UnavailableError, abort

log = structlog.get_logger("taper")

Behaviour = Callable[[Call], Awaitable[Message | bytes | None]]
"""Gives the response of a method, or writes the responses of one that streams. Raises ServiceError."""


class Method(NamedTuple):
    """What a method does.

    max_bytes  of its message
    calls      its calls in flight, with those of other methods
    roles      it may be called by who has one of them; none: by everybody, and nobody is asked who it is
    ended      is told of every call's end: its code, and the reason if there is one
    """

    behave: Behaviour
    max_bytes: int
    calls: Calls
    roles: frozenset[Role] = ROLES
    ended: Callable[[Call, str, str], object] = lambda call, code, reason: None


def full_name(module: Any) -> str:
    """The name of the one service of a module of stubs."""
    (descriptor,) = module.DESCRIPTOR.services_by_name.values()
    return descriptor.full_name


def add_service(
    server: grpc.aio.Server, module: Any, methods: Mapping[str, Method], callers: Callers, name: str = ""
) -> None:
    """Let the server answer these methods of the one service of a module of stubs. `name` is the server's."""
    (descriptor,) = module.DESCRIPTOR.services_by_name.values()
    handlers = {
        each: _handler(each, method, callers, name, streams=descriptor.methods_by_name[each].server_streaming)
        for each, method in methods.items()
    }
    generic = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))


def _handler(
    name: str, method: Method, callers: Callers, server: str, *, streams: bool
) -> grpc.RpcMethodHandler:
    """To gRPC the requests are a stream, so that the handler runs before its one message has come."""

    async def answer(_: Any, context: grpc.aio.ServicerContext) -> bytes | None:
        call, code, reason = Call(context, method.max_bytes, server), "CANCELLED", ""
        try:
            outcome = await _outcome(name, method, call, callers)
            if isinstance(outcome, ServiceError):
                outcome.server = call.server
                # What it was refused for counts, even if its client does not wait to be told.
                code, reason = outcome.code.name, outcome.reason
                await method.calls.refuse(call.caller.client, outcome)
            else:
                code = "OK"
        finally:
            _ended(name, method, call, code, reason)
        return await abort(context, outcome) if isinstance(outcome, ServiceError) else outcome

    make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
    return make(answer)


def _ended(name: str, method: Method, call: Call, code: str, reason: str) -> None:
    """Tell of it. A bug there is nothing for the caller, to whom gRPC would say what it raised."""
    try:
        method.ended(call, code, reason)
        log.debug("call", method=name, peer=call.caller.connection, code=code, seconds=call.seconds)
    except Exception:
        log.exception("bug", method=name, request_id=call.id)


async def _outcome(name: str, method: Method, call: Call, callers: Callers) -> bytes | ServiceError | None:
    """The response, or why there is none. What is not a ServiceError is a bug, and told to the log alone."""
    try:
        if method.roles:
            call.identify(callers, method.roles)
        with method.calls.one_more(call):
            response = await method.behave(call)
            return response.SerializeToString() if isinstance(response, Message) else response
    except DuplicateRequestError as error:
        # What runs may be its own first attempt, whose connection has broken: it may be made once more.
        failure = UnavailableError(error.message, reason=error.reason) if call.is_retried else error
    except ServiceError as error:
        failure = error
    except asyncio.CancelledError:
        if call.error is None:
            raise  # its client is gone
        failure = call.error
    except grpc.aio.BaseError:
        raise  # the call itself is broken: its client is gone
    except Exception:
        log.exception("bug", method=name, request_id=call.id)
        failure = InternalError("internal error")
    if isinstance(failure, InternalError):
        failure.request_id = failure.request_id or call.id
    # Its frames would keep the message for as long as they refer to the error, and so to themselves.
    failure.__traceback__ = failure.__context__ = None
    return failure
