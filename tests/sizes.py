"""Which values of a matrix every run tries, and which are left to `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters of a test: those in `always` plainly, all others marked `full`."""
    values = list(values)
    assert all(value in values for value in always), f"{always} is not a sample of {values}"
    return [value if value in always else _in_full(value) for value in values]


def _in_full(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.full)
