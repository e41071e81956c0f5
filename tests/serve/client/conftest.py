"""A server that answers everything with the same fork and join, for all tests of a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from tests.serve.fakes import FakeEngine, fork_and_join, listening


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """The log of a server in this process would stand in the output of the client."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(fork_and_join)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with listening(engine) as address:
        yield address
