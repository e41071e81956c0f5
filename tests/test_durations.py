"""What compares times is right about growth, and is not led astray by a run that others lengthened."""

from __future__ import annotations

from itertools import chain, repeat

import pytest

from tests.durations import MOST_TRIES, is_linear, takes_less


@pytest.mark.parametrize(("power", "linear"), [(1.0, True), (1.6, False), (2.0, False)])
def test_time_that_grows_faster_than_the_size_is_not_linear(power: float, linear: bool) -> None:
    assert is_linear(lambda size: size**power, 2000) == linear


def test_a_try_that_others_lengthen_is_made_up_for_and_tries_end() -> None:
    late = chain((9.0, 9.0, 1.0), repeat(9.0))
    assert takes_less(lambda: next(late), 2, lambda: 1.0)
    tries: list[float] = []

    def slow() -> float:
        tries.append(9.0)
        return 9.0

    assert not takes_less(slow, 2, lambda: 1.0)
    assert len(tries) == MOST_TRIES
