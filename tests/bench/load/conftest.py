"""What is printed is the benchmarks' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.quiet import quiet


@pytest.fixture(autouse=True, scope="module")
def no_log() -> Iterator[None]:
    """The log of a server in this process would stand between the figures."""
    with quiet():
        yield
