"""What numbers an option takes, said beside its type: `port: Port[int]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from serve.config.errors import OptionError

T = TypeVar("T")
MOST = 2**31 - 1  # of what is counted: on the device, and on the wire


class Range(NamedTuple):
    """`what` is said to whoever gives a number that it does not hold."""

    holds: Callable[[float], bool]
    what: str


def _between(least: int, most: int) -> Range:
    return Range(lambda value: least <= value <= most, f"from {least} to {most}")


Count = Annotated[T, _between(1, MOST)]
CountOrZero = Annotated[T, _between(0, MOST)]
CountOfGrpc = Annotated[T, _between(1, MOST // 4)]  # its own limits are four times as much
Mebibytes = Annotated[T, _between(1, 2**42)]
Port = Annotated[T, _between(0, 2**16 - 1)]
Seed = Annotated[T, _between(0, 2**32 - 1)]
Seconds = Annotated[T, _between(0, 10**9)]  # a thread can wait for some ten times as long
Positive = Annotated[T, Range(lambda value: value > 0, "more than 0")]
NotNegative = Annotated[
    T, Range(lambda value: value >= 0 and math.isfinite(value), "a number that is not negative")
]
Share = Annotated[T, Range(lambda value: 0 <= value <= 1, "a share between 0 and 1")]


def check_ranges(config: Any) -> None:
    """Raises OptionError for a number of a dataclass that is out of its range. None is in every range."""
    for option, allowed in _ranges(type(config)).items():
        value = getattr(config, option)
        if value is not None and not allowed.holds(value):
            raise OptionError.must_be(option, allowed.what, value)


@cache
def _ranges(of: type) -> dict[str, Range]:
    hints = get_type_hints(of, include_extras=True)
    return {
        option: allowed
        for option, hint in hints.items()
        for allowed in getattr(hint, "__metadata__", ())
        if isinstance(allowed, Range)
    }
