from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.slack import pace, prompt_deadline, slack
from tests.scheduler.strategies import examples


def test_slack_is_what_the_most_urgent_request_can_spare_beyond_the_baseline() -> None:
    assert slack([10.5, 10.2], start=10.0, baseline=0.05) == pytest.approx(0.15)


def test_a_late_request_stops_nobody_else() -> None:
    assert slack([10.04, 10.2], start=10.0, baseline=0.05) == pytest.approx(0.15)


def test_there_is_no_slack_if_all_are_late_or_nobody_is_there() -> None:
    assert slack([10.04, 9.0], start=10.0, baseline=0.05) == 0.0
    assert slack([], start=10.0, baseline=0.05) == 0.0


@examples(100)
@given(st.lists(st.floats(0, 10), max_size=5), st.floats(0, 10), st.floats(0.001, 1), st.floats(0, 10))
def test_slack_is_never_negative_and_a_request_on_time_never_adds_to_it(
    deadlines: list[float], start: float, baseline: float, deadline: float
) -> None:
    before = slack(deadlines, start, baseline)
    assert before >= 0.0
    if before > 0.0:
        assert slack([*deadlines, deadline], start, baseline) <= before


def test_a_prompt_is_due_in_even_chunks() -> None:
    assert prompt_deadline(ttft_deadline=12.0, start=10.0, tokens_left=100, chunk=32) == 10.5
    assert prompt_deadline(ttft_deadline=10.0, start=10.0, tokens_left=100, chunk=32) is None


def test_a_prompt_read_at_its_pace_is_done_in_time() -> None:
    deadline, start, left, step = 1.0, 0.0, 1000, 0.03
    while left > 0:
        left -= pace(deadline, start, left, step)
        start += step
    assert start <= deadline


def test_a_prompt_that_is_late_or_never_due_has_no_pace() -> None:
    assert pace(1.0, 1.0, 100, 0.1) == 0
    assert pace(math.inf, 1.0, 100, 0.1) == 0


def test_a_prompt_due_within_the_step_is_wanted_whole() -> None:
    assert pace(1.05, 1.0, 100, 0.1) == 100
