from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.predictor import StepLatencyModel
from tests.scheduler.strategies import examples


def test_time_is_a_staircase_in_the_rows_and_a_line_in_the_kv() -> None:
    model = StepLatencyModel({4: 0.010, 8: 0.014}, kv_token_seconds=1e-6)
    assert model.predict(1, 0) == model.predict(4, 0) == 0.010
    assert model.predict(5, 0) == 0.014
    assert model.predict(4, 1000) == pytest.approx(0.011)


def test_a_larger_bucket_never_costs_less() -> None:
    model = StepLatencyModel({4: 0.010, 8: 0.009, 16: 0.012})
    assert [model.predict(rows, 0) for rows in (4, 8, 16)] == [0.010, 0.010, 0.012]


def test_reading_kv_never_saves_time() -> None:
    assert StepLatencyModel({4: 0.010}, kv_token_seconds=-1e-6).predict(4, 1000) == 0.010


def test_a_step_that_takes_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 0 seconds"):
        StepLatencyModel({4: 0.0})


@pytest.mark.parametrize("factor", [0.5, 1.3, 3.0])
def test_the_scale_follows_the_machine(factor: float) -> None:
    model = StepLatencyModel({4: 0.010})
    for _ in range(500):
        model.observe(4, 0, 0.010 * factor)
    assert model.predict(4, 0) == pytest.approx(0.010 * factor, rel=0.01)


def test_too_low_is_corrected_faster_than_too_high() -> None:
    low, high = StepLatencyModel({4: 0.010}), StepLatencyModel({4: 0.010})
    low.observe(4, 0, 0.012)
    high.observe(4, 0, 0.008)
    assert low.scale - 1 > 4 * (1 - high.scale) > 0


def test_one_stalled_step_moves_little() -> None:
    model = StepLatencyModel({4: 0.010})
    model.observe(4, 0, 10.0)
    assert model.scale <= 1.05


@examples(50)
@given(st.lists(st.floats(0.0, 100.0), max_size=200))
def test_the_scale_stays_within_bounds(seconds: list[float]) -> None:
    model = StepLatencyModel({4: 0.010})
    for observed in seconds:
        model.observe(4, 0, observed)
    assert 0.25 <= model.scale <= 4.0
