"""A server that answers everything with the same fork and join, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.fakes import FakeEngine, fork_and_join, listening
from tests.serve.quiet import quiet


@pytest.fixture(autouse=True, scope="module")
def no_log() -> Iterator[None]:
    """The log of a server in this process would stand in the output of the client."""
    with quiet():
        yield


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(fork_and_join)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with listening(engine) as address:
        yield address
