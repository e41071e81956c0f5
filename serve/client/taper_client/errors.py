"""What can go wrong with a call, the same on both sides of the wire.

The server raises these and `status` writes them as a gRPC status with google.rpc details; the client reads
the status back into the same exception with `from_rpc`. The contract: every call ends with OK or with one of

    InvalidRequestError     INVALID_ARGUMENT    BadRequest: violations by field path; a ValueError.
                                                INVALID_FIELD, PROMPT_TOO_LONG, SLO_BELOW_FLOOR;
                                                MALFORMED: the bytes are no such message; MESSAGE_TOO_LARGE
    OverloadedError         RESOURCE_EXHAUSTED  QUEUE_FULL, CLIENT_LIMIT, TOO_MANY_CALLS, SLO_UNATTAINABLE:
                                                wait; RetryInfo. KV_FULL: it never fits; SLOW_CONSUMER: read
                                                faster; PROMPT_TOO_COSTLY: reading it takes too much
    UnavailableError        UNAVAILABLE         starting, draining or broken: go elsewhere; RetryInfo
    UnauthenticatedError    UNAUTHENTICATED     NO_TOKEN: this server asks for a token, and none came;
                                                WRONG_TOKEN: it is none of the server's;
                                                WRONG_CERTIFICATE: it has no name that tells whose it is
    PermissionDeniedError   PERMISSION_DENIED   WRONG_ROLE: the token is not for this method
    DuplicateRequestError   ALREADY_EXISTS      a running request has this id
    CancelledError          CANCELLED           by the caller, or by Abort: ABORTED
    DeadlineExceededError   DEADLINE_EXCEEDED   the call's own deadline
    InternalError           INTERNAL            a bug of the server's; RequestInfo, nothing of the inside. The
                                                log has the same id: the request's, or one made for the call
    ServiceError            NOT_FOUND           health of a service that does not exist

Some statuses are gRPC's own, and bare: UNIMPLEMENTED for a method that does not exist and for a compressed
message; RESOURCE_EXHAUSTED for a message of over four times the server's limit, and for headers over 8 KiB;
CANCELLED and DEADLINE_EXCEEDED where the caller itself ends the call; CANCELLED for some of over 16384
calls that come at one moment; UNAVAILABLE where no server is.

`RETRY_AFTER` says for every reason whether the same request may be taken a little later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status

DOMAIN = "taper.v1"
_SERVER_KEY = "taper-server"
_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_DETAILS_BYTES = 2500  # gRPC clients drop trailing metadata of more than 8 KiB, base64 and all
_MESSAGE_BYTES = 600  # it travels twice, once with percent signs
_LONGEST_WAIT = 86_400.0  # seconds that a client is told to wait: more is a guess, and no infinity fits


_SOON = 1.0

RETRY_AFTER: Mapping[str, float | None] = {
    "QUEUE_FULL": _SOON,
    "CLIENT_LIMIT": _SOON,
    "SLO_UNATTAINABLE": _SOON,
    "STARTING": _SOON,
    "DRAINING": _SOON,  # by then, another server has taken over
    "STOPPED": _SOON,
    "FAILED": _SOON,
    "KV_FULL": None,  # there are fewer pages than it may need, whoever else is being served
    "SLOW_CONSUMER": None,  # its reader is slow, and the server is not busy
    "TOO_MANY_CALLS": _SOON,
    "PROMPT_TOO_COSTLY": None,  # it would be again
    "INVALID_FIELD": None,
    "SLO_BELOW_FLOOR": None,  # it could be kept for nobody
    "MALFORMED": None,
    "MESSAGE_TOO_LARGE": None,
    "PROMPT_TOO_LONG": None,
    "DUPLICATE": None,
    "ABORTED": None,
    "NO_TOKEN": None,
    "WRONG_TOKEN": None,
    "WRONG_CERTIFICATE": None,
    "WRONG_ROLE": None,
    "ENGINE_FAILED": None,
}
"""Of each reason that a server gives: the seconds after which trying again makes sense, if nothing better is
known; None: it does not."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request.

    field        the path to it, like `plan.stages[1].serial.stopping.max_tokens`
    description  what was given, and what is possible
    """

    field: str
    description: str


class ServiceError(Exception):
    """A call that failed.

    message      what happened, in words
    code         gRPC's status
    reason       a constant to branch on, e.g. QUEUE_FULL; empty when the code says it all
    violations   what is wrong with the request, by field
    metadata     numbers behind the reason, e.g. {"limit": "4096", "got": "5000"}
    retry_after  seconds after which trying again makes sense; None: it does not
    request_id   the request, where the server said so
    server       which server answered so, by the name that it has for itself; empty: none did
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.request_id = request_id
        self.server = ""

    def hinted(self, hint: str) -> Self:
        """With what may help against it, in its message."""
        self.message = f"{hint}; {self.message}"
        self.args = (self.message,)
        return self

    def by(self, server: str) -> Self:
        """With the name of the server whose call it was, if it has not told that itself."""
        self.server = self.server or server
        return self

    @classmethod
    def because(
        cls, reason: str, message: str, *, request_id: str = "", retry_after: float | None = None
    ) -> Self:
        """For one of the reasons in `RETRY_AFTER`, which decides whether trying again makes sense; after
        `retry_after` seconds, if that is known."""
        after = RETRY_AFTER[reason] if retry_after is None else retry_after
        return cls(message, reason=reason, retry_after=after, request_id=request_id)


class InvalidRequestError(ServiceError, ValueError):
    """Something is wrong with the request, at the fields of `violations`."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(
        cls,
        violations: Sequence[Violation],
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        count: int = 0,
    ) -> InvalidRequestError:
        """All of `violations`, as far as a status has room for them: the first of `count`."""
        count = max(count, len(violations))
        shown: list[Violation] = []
        room = _DETAILS_BYTES
        for violation in violations:
            field, description = violation.field[:200], violation.description[:200]
            room -= len(field.encode()) + len(description.encode()) + 8
            if room < 0:
                break
            shown.append(Violation(field, description))
        if len(shown) < count:
            shown.append(Violation("", f"and {count - len(shown)} more"))
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in shown[:3])
        if len(shown) > 3:
            message += f"; and {count - 3} more"
        message = message.encode()[:_MESSAGE_BYTES].decode(errors="ignore")
        return cls(message, reason=reason or "INVALID_FIELD", violations=shown, metadata=metadata)


class OverloadedError(ServiceError):
    """The server, or this client's share of it, has no room for the request."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(ServiceError):
    """No server is there, or it is starting, draining or broken: go elsewhere, or try again."""

    code = grpc.StatusCode.UNAVAILABLE


class UnauthenticatedError(ServiceError):
    """The server does not know who calls."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(ServiceError):
    """The server knows who calls, and the call is not for them."""

    code = grpc.StatusCode.PERMISSION_DENIED


class DuplicateRequestError(ServiceError):
    """A request with this id is running."""

    code = grpc.StatusCode.ALREADY_EXISTS


class CancelledError(ServiceError):
    """The request was ended, by its caller or by Abort."""

    code = grpc.StatusCode.CANCELLED


class DeadlineExceededError(ServiceError):
    """The call's own deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class InternalError(ServiceError):
    """A bug of the server's, whose log has more by `request_id`."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE = {
    error.code: error
    for error in (
        InvalidRequestError,
        OverloadedError,
        UnavailableError,
        UnauthenticatedError,
        PermissionDeniedError,
        DuplicateRequestError,
        CancelledError,
        DeadlineExceededError,
        InternalError,
    )
}


def refused(reason: str, detail: str, retry_after: float | None = None) -> ServiceError:
    """The engine's refusal to take a request, as what the caller should see."""
    if reason == "DUPLICATE":
        return DuplicateRequestError.because(reason, detail)
    if reason in ("STARTING", "DRAINING"):
        return UnavailableError.because(reason, detail)
    return OverloadedError.because(reason, detail, retry_after=retry_after)


def status(error: ServiceError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """Code, message and trailing metadata that tell a client everything about `error`."""
    rich = Status(code=error.code.value[0], message=error.message)
    if error.reason:
        rich.details.add().Pack(
            details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
        )
    if error.violations:
        fields = [
            details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations
        ]
        rich.details.add().Pack(details_pb2.BadRequest(field_violations=fields))
    if error.request_id:
        rich.details.add().Pack(details_pb2.RequestInfo(request_id=error.request_id))
    trailing: list[tuple[str, str | bytes]] = []
    if error.retry_after is not None:
        after = min(error.retry_after, _LONGEST_WAIT)
        delay = Duration()
        delay.FromNanoseconds(round(after * 1e9))
        rich.details.add().Pack(details_pb2.RetryInfo(retry_delay=delay))
        if error.code is not grpc.StatusCode.UNAVAILABLE:  # another server need not be waited for
            trailing.append((_PUSHBACK_KEY, str(round(after * 1000))))
    if error.server:
        trailing.append((_SERVER_KEY, error.server))
    trailing.append((_DETAILS_KEY, rich.SerializeToString()))
    return error.code, error.message, tuple(trailing)


async def abort(context: grpc.aio.ServicerContext, error: ServiceError) -> NoReturn:
    """End the call with `error`'s status."""
    code, message, trailing = status(error)
    await context.abort(code, message, trailing)
    raise AssertionError("abort always raises")


def from_rpc(error: Any) -> ServiceError:
    """The exception that the server raised, from grpc.RpcError, sync or asyncio."""
    trailing = dict(error.trailing_metadata() or ())
    reason, retry_after, request_id = "", None, ""
    violations: list[Violation] = []
    metadata: dict[str, str] = {}
    for detail in Status.FromString(trailing.get(_DETAILS_KEY, b"")).details:
        info, bad = details_pb2.ErrorInfo(), details_pb2.BadRequest()
        retry, request = details_pb2.RetryInfo(), details_pb2.RequestInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = [Violation(field.field, field.description) for field in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(request):
            request_id = request.request_id
    failure = _BY_CODE.get(error.code(), ServiceError)(
        error.details() or error.code().name,
        reason=reason,
        violations=violations,
        metadata=metadata,
        retry_after=retry_after,
        request_id=request_id,
    )
    failure.code = error.code()
    return failure.by(trailing.get(_SERVER_KEY, ""))
