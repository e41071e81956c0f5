"""A hint is given where TLS or a token is the likely cause; test_credentials.py has those of real servers."""

from __future__ import annotations

import grpc
import pytest

from taper_client.errors import ServiceError
from taper_client.hints import hint


@pytest.mark.parametrize(
    ("code", "reason", "message"),
    [
        (grpc.StatusCode.UNAVAILABLE, "", "Socket closed"),  # after it has stood
        (grpc.StatusCode.UNAVAILABLE, "DRAINING", "failed to connect to all addresses; Socket closed"),
        (grpc.StatusCode.INTERNAL, "", "failed to connect to all addresses; Socket closed"),
        (grpc.StatusCode.UNAUTHENTICATED, "WRONG_TOKEN", "this server does not know the token"),
    ],
)
def test_what_has_other_causes_has_no_hint(code, reason, message):
    failure = ServiceError(message, reason=reason)
    failure.code = code
    for encrypted in (False, True):
        assert hint(failure, "a:1", encrypted=encrypted, certified=False) == ""
