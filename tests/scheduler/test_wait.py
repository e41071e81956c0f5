"""What the queue learns of when newcomers can start, and how fast prompts are read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.wait import WaitModel


def test_gaps_are_those_between_starts_while_somebody_waits() -> None:
    model = WaitModel(100.0)
    model.started(1.0)  # nobody had to wait for it
    model.nobody_waits()
    model.waits(5.0)
    assert model.is_blocked
    model.waits(6.0)  # since 5.0
    for start in (7.0, 8.0, 11.0):
        model.started(start)
    assert model.gap(lambda: 99.0) == pytest.approx((2.0 + 1.0 + 3.0) / 3)
    model.nobody_waits()
    assert not model.is_blocked
    model.waits(50.0)
    model.started(50.5)
    assert model.gap(lambda: 99.0) == pytest.approx((2.0 + 1.0 + 3.0 + 0.5) / 4)


def test_a_guess_counts_until_there_is_something_to_learn_from() -> None:
    model = WaitModel(100.0)
    assert model.gap(lambda: 3.0) == 3.0
    model.waits(0.0)
    model.started(1.0)
    assert model.gap(lambda: 3.0) == 2.0
    model.started(2.0)
    assert model.gap(lambda: 3.0) == 1.0


def test_old_gaps_are_forgotten() -> None:
    model = WaitModel(100.0)
    model.waits(0.0)
    for start in range(10, 100, 10):
        model.started(start)
    for start in range(WaitModel.STARTS):
        model.started(90.0 + start + 1)
    assert model.gap(lambda: 0.0) == pytest.approx(1.0)


def test_reading_is_as_fast_as_it_has_lately_been() -> None:
    model = WaitModel(100.0)
    assert model.reading(50) == pytest.approx(0.5)
    for _ in range(500):
        model.read(0.1, 0)
        model.read(0.1, 400)
    assert model.reading(1000) == pytest.approx(0.5, rel=0.05)
    for _ in range(500):
        model.prompt(1000, 100)
    assert model.reading(1000) == pytest.approx(0.05, rel=0.05), "nine tenths are cached"


def test_several_that_start_at_once_leave_a_gap_to_divide_by() -> None:
    model = WaitModel(100.0)
    model.waits(1.0)
    for _ in range(WaitModel.STARTS):
        model.started(1.0)
    assert model.gap(lambda: 9.0) > 0


@given(st.floats(0, 1e4))
def test_the_most_starts_are_those_that_come_within_the_gaps(gaps: float) -> None:
    model = WaitModel(1.0)
    most = model.most_starts(gaps)
    assert model.longest(most) <= gaps * (1 + 1e-9)
    assert model.longest(most + 1) > gaps * (1 - 1e-9)


def test_no_start_comes_in_less_than_no_time() -> None:
    assert WaitModel(1.0).most_starts(-0.1) == -1
    assert WaitModel(1.0).longest(0) == 0.0
    assert WaitModel(1.0).longest(4) == pytest.approx(4 + WaitModel.CAUTION * math.sqrt(4))
