"""An error looks the same on both sides of the wire."""

from __future__ import annotations

import math
from typing import get_args
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status

from serve import door
from taper_client import errors
from taper_client.errors import (
    InvalidRequestError,
    OverloadedError,
    ServiceError,
    UnavailableError,
    Violation,
)


class Call:
    """What gRPC gives a client when a call fails."""

    def __init__(self, code: grpc.StatusCode, message: str, trailing=()) -> None:
        self._answer = code, message, trailing

    def code(self):
        return self._answer[0]

    def details(self):
        return self._answer[1]

    def trailing_metadata(self):
        return self._answer[2]


def over_the_wire(error: ServiceError) -> ServiceError:
    return errors.from_rpc(Call(*errors.status(error)))


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError.of(
            [Violation("prompt", "too long")], reason="PROMPT_TOO_LONG", metadata={"got": "9"}
        ),
        OverloadedError("full", reason="QUEUE_FULL", retry_after=1.5),
        UnavailableError("starting", reason="STARTING", retry_after=1.0),
        errors.UnauthenticatedError("who is this?", reason="NO_TOKEN"),
        errors.PermissionDeniedError("not for this", reason="WRONG_ROLE"),
        errors.DuplicateRequestError("again", reason="DUPLICATE"),
        errors.CancelledError("aborted", reason="ABORTED", request_id="r1"),
        errors.InternalError("internal error", request_id="r1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_is_lost_on_the_wire(error):
    got = over_the_wire(error)
    assert type(got) is type(error)
    assert vars(got) | {"code": error.code} == vars(error) | {"code": error.code}
    assert str(got) == str(error)


def test_what_goes_with_a_request_error_is_kept():
    error = InvalidRequestError.of([Violation("prompt", "long")], reason="TOO_LONG", metadata={"got": "9"})
    assert (error.reason, error.metadata) == ("TOO_LONG", {"got": "9"})


def test_a_failure_without_a_message_is_named_by_its_code():
    assert errors.from_rpc(Call(grpc.StatusCode.UNAVAILABLE, "")).message == "UNAVAILABLE"


def test_codes_of_their_own_are_kept():
    got = errors.from_rpc(Call(grpc.StatusCode.UNIMPLEMENTED, "no such method", None))
    assert (type(got), got.code, got.message) == (
        ServiceError,
        grpc.StatusCode.UNIMPLEMENTED,
        "no such method",
    )


def test_overload_says_when_to_come_back_in_both_of_grpcs_ways():
    _, _, trailing = errors.status(OverloadedError("full", reason="QUEUE_FULL", retry_after=2.5))
    metadata = dict(trailing)
    assert metadata["grpc-retry-pushback-ms"] == "2500"
    kinds = [detail.TypeName() for detail in Status.FromString(metadata["grpc-status-details-bin"]).details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        ("QUEUE_FULL", OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("KV_FULL", OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("SLO_UNATTAINABLE", OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("STARTING", UnavailableError, grpc.StatusCode.UNAVAILABLE),
        ("DRAINING", UnavailableError, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_refusals_of_the_engine_carry_their_reason(reason, kind, code):
    error = errors.refused(reason, "because")
    assert (type(error), error.code, error.reason, error.message) == (kind, code, reason, "because")


RETRYABLE = {
    "QUEUE_FULL",
    "CLIENT_LIMIT",
    "TOO_MANY_CALLS",
    "SLO_UNATTAINABLE",
    "STARTING",
    "DRAINING",
    "STOPPED",
    "FAILED",
}
FUTILE = {
    "KV_FULL",
    "SLOW_CONSUMER",
    "INVALID_FIELD",
    "SLO_BELOW_FLOOR",
    "MALFORMED",
    "MESSAGE_TOO_LARGE",
    "PROMPT_TOO_COSTLY",
    "PROMPT_TOO_LONG",
    "DUPLICATE",
    "ABORTED",
    "NO_TOKEN",
    "WRONG_TOKEN",
    "WRONG_CERTIFICATE",
    "WRONG_ROLE",
    "ENGINE_FAILED",
}


def hints(error: ServiceError) -> tuple[float | None, str | None]:
    """When to try again, in gRPC's two ways: RetryInfo, in seconds, and the pushback in milliseconds."""
    metadata = dict(errors.status(error)[2])
    retry = details_pb2.RetryInfo()
    details = Status.FromString(metadata["grpc-status-details-bin"]).details
    found = [retry.retry_delay.ToNanoseconds() / 1e9 for detail in details if detail.Unpack(retry)]
    return (found or [None])[0], metadata.get("grpc-retry-pushback-ms")


@pytest.mark.parametrize("reason", sorted(RETRYABLE | FUTILE))
def test_a_reason_for_which_waiting_helps_says_when_to_come_back_and_no_other_does(reason: str):
    expected = (1.0, "1000") if reason in RETRYABLE else (None, None)
    assert hints(ServiceError.because(reason, "so")) == expected
    assert over_the_wire(ServiceError.because(reason, "so")).retry_after == expected[0]


def test_a_server_that_is_not_there_keeps_nobody_from_asking_another_at_once():
    """gRPC's own retries would wait as long as the pushback says, whichever server is next."""
    assert hints(UnavailableError.because("DRAINING", "so")) == (1.0, None)


def test_an_error_tells_which_server_it_is_from():
    error = UnavailableError("so").by("here:1").by("there:2")
    assert dict(errors.status(error)[2])["taper-server"] == error.server == "here:1"
    assert "taper-server" not in dict(errors.status(UnavailableError("so"))[2])


def test_every_reason_is_known_to_help_or_not():
    assert errors.RETRY_AFTER.keys() == RETRYABLE | FUTILE
    assert {*get_args(door.Reason)} <= errors.RETRY_AFTER.keys()
    assert {*get_args(door.State)} - {"SERVING"} <= errors.RETRY_AFTER.keys()
    with pytest.raises(KeyError):
        ServiceError.because("NEW", "a reason that nobody has thought about")


def test_what_is_wrong_with_a_request_stays_wrong():
    for error in (
        InvalidRequestError.of([Violation("plan", "too wide")]),
        InvalidRequestError.of([Violation("prompt", "too long")], reason="PROMPT_TOO_LONG"),
    ):
        assert error.reason in FUTILE
        assert hints(error) == (None, None)


def test_what_is_known_of_when_to_retry_takes_the_place_of_the_rule():
    error = over_the_wire(errors.refused("SLO_UNATTAINABLE", "busy", 12.5))
    assert (error.reason, error.retry_after) == ("SLO_UNATTAINABLE", 12.5)
    assert errors.refused("QUEUE_FULL", "busy").retry_after == errors.RETRY_AFTER["QUEUE_FULL"]


@pytest.mark.parametrize("seconds", [1e12, math.inf])
def test_no_wait_is_too_long_to_be_said(seconds: float):
    assert over_the_wire(errors.refused("SLO_UNATTAINABLE", "busy", seconds)).retry_after == 86_400.0


def test_a_duplicate_is_no_use_retrying():
    error = errors.refused("DUPLICATE", "r1 is running")
    assert (error.code, error.retry_after) == (grpc.StatusCode.ALREADY_EXISTS, None)
    assert (error.reason, error.message) == ("DUPLICATE", "r1 is running")


def test_a_status_repeats_code_and_message_in_its_details():
    code, message, trailing = errors.status(InvalidRequestError("no", reason="TOO_MANY"))
    rich = Status.FromString(dict(trailing)["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (3, "no")
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "no")
    info = details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("TOO_MANY", "taper.v1")


def test_a_flood_of_violations_still_fits_into_a_status():
    flood = [Violation(f"prompt.token_ids.ids[{i}]", "🙂" * 1000) for i in range(10_000)]
    code, message, trailing = errors.status(InvalidRequestError.of(flood))
    encoded = len(quote(message)) + sum(len(key) + len(value) * 4 // 3 for key, value in trailing)
    assert encoded < 7000
    bad = details_pb2.BadRequest()
    rich = Status.FromString(dict(trailing)["grpc-status-details-bin"])
    assert any(detail.Unpack(bad) for detail in rich.details)
    shown = bad.field_violations
    assert shown[-1].description == f"and {10_000 - len(shown) + 1} more"
    assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("count", "end"), [(1, "f0: d0"), (3, "f2: d2"), (4, "; and 1 more"), (9, "; and 6 more")]
)
def test_a_message_shows_three_violations_and_counts_the_others(count, end):
    error = InvalidRequestError.of([Violation(f"f{i}", f"d{i}") for i in range(count)])
    assert error.message.endswith(end)
    assert error.message.startswith("; ".join(f"f{i}: d{i}" for i in range(min(3, count))))
    assert len(error.violations) == count
    assert error.reason == "INVALID_FIELD"


def test_a_violation_is_cut_where_it_is_very_long():
    (short,) = InvalidRequestError.of([Violation("f" * 200, "d" * 200)]).violations
    assert (len(short.field), len(short.description)) == (200, 200)
    (cut,) = InvalidRequestError.of([Violation("f" * 300, "d" * 300)]).violations
    assert cut == short


def test_a_message_counts_the_violations_that_a_status_has_no_room_for():
    flood = [Violation("prompt", "x" * 100)] * 200
    error = InvalidRequestError.of(flood)
    assert len(error.violations) < len(flood)
    assert error.message.endswith(f"; and {len(flood) - 3} more")
