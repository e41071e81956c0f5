"""Comparing how long things take, on a machine that others use, too."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST_TRIES = 5


def takes_less(this: Callable[[], float], times: float, that: Callable[[], float]) -> bool:
    """Whether this takes less than so many times as long as that. Each does its work and returns seconds.

    The shortest of several tries of each are compared, since others lengthen a run and never shorten it. Both
    are tried twice, then as often as it takes for the answer to be yes.
    """
    one = other = math.inf
    for tried in range(1, MOST_TRIES + 1):
        one, other = min(one, this()), min(other, that())
        if tried > 1 and one < times * other:
            return True
    return False


def is_linear(seconds: Callable[[int], float], size: int) -> bool:
    """Whether the seconds grow with the size, and not with its square: that would be sixteen times as long
    for four times the size."""
    return takes_less(lambda: seconds(4 * size), 8, lambda: seconds(size))
