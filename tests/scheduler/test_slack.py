from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.slack import AIM, prompt_deadline, prompt_pace, slack, token_deadline
from tests.scheduler.strategies import examples


def test_slack_is_what_the_most_urgent_request_can_spare_beyond_the_baseline() -> None:
    assert slack([10.5, 10.2], start=10.0, baseline=0.05) == pytest.approx(0.15)


def test_a_late_request_stops_nobody_else() -> None:
    assert slack([10.04, 10.2], start=10.0, baseline=0.05) == pytest.approx(0.15)


def test_who_just_meets_the_deadline_is_not_late_and_leaves_no_slack() -> None:
    assert slack([10.5, 20.0], start=10.0, baseline=0.5) == 0.0


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


# --- the next token's deadline -----------------------------------------------------------------------------


def test_a_token_is_due_a_target_after_the_one_before_it() -> None:
    for ahead in (-1.0, 0.0, 1.0):
        assert token_deadline(10.0, 0.05, ahead, repay=0.0) == pytest.approx(10.05)


def test_a_request_behind_its_pace_is_due_earlier_by_a_share_of_the_debt() -> None:
    assert token_deadline(10.0, 0.05, ahead=-0.002, repay=8.0) == pytest.approx(10.05 - 0.002 / 8)
    assert token_deadline(10.0, 0.05, ahead=-9.0, repay=8.0) == pytest.approx(10.045), "a tenth at most"


def test_a_request_ahead_of_its_pace_gains_nothing() -> None:
    for ahead in (2.0, 0.01, 0.0):
        assert token_deadline(10.0, 0.05, ahead, repay=8.0) == pytest.approx(10.05)


def test_nothing_is_ever_due_without_a_target() -> None:
    assert token_deadline(10.0, math.inf, -1.0, repay=8.0) == math.inf


@examples(50)
@given(st.floats(0.0, 0.2), st.floats(-0.03, 0.03), st.integers(40, 200))
def test_a_debt_is_paid_back_whatever_the_bias_of_the_predictor(late: float, bias: float, stage: int) -> None:
    """Each step takes all that it may, and a little more or less; the stage as a whole meets its target."""
    tpot = 0.05
    last = late  # of the first token: it waited, as after a join
    for tokens in range(1, stage):
        allowed = token_deadline(last, tpot, tokens * AIM * tpot - last, repay=8.0) - last
        last += allowed * (1.0 + bias)
    wait = max(0.0, late - tpot)
    assert last / stage <= tpot * 1.002 + max(0.0, wait - 0.1 * tpot * stage) / stage


# --- prompts -----------------------------------------------------------------------------------------------


def test_a_prompt_is_due_in_even_chunks() -> None:
    assert prompt_deadline(ttft_deadline=12.0, start=10.0, tokens_left=100, chunk=32) == 10.5
    assert prompt_deadline(ttft_deadline=10.0, start=10.0, tokens_left=100, chunk=32) is None


def test_a_prompt_read_at_its_pace_is_done_in_time() -> None:
    deadline, start, left, step = 1.0, 0.0, 1000, 0.03
    while left > 0:
        left -= prompt_pace(deadline, start, left, step)
        start += step
    assert start <= deadline


def test_a_prompt_that_is_late_or_never_due_has_no_pace() -> None:
    assert prompt_pace(1.0, 1.0, 100, 0.1) == 0
    assert prompt_pace(math.inf, 1.0, 100, 0.1) == 0


def test_a_prompt_is_read_in_equal_parts_in_the_steps_that_are_left() -> None:
    """And not sooner: 3.5 steps are left until the target, of which three are whole."""
    assert prompt_pace(ttft_deadline=2.75, start=1.0, tokens_left=100, step_seconds=0.5) == 34
    assert prompt_pace(ttft_deadline=3.0, start=1.0, tokens_left=100, step_seconds=0.5) == 25


def test_a_prompt_due_within_the_step_is_wanted_whole() -> None:
    assert prompt_pace(1.05, 1.0, 100, 0.1) == 100


def test_a_margin_is_a_share_of_the_whole_step() -> None:
    assert slack([20.0], start=10.0, baseline=4.0, margin=0.25) == pytest.approx(10.0 / 1.25 - 4.0)
    assert slack([20.0], start=10.0, baseline=9.0, margin=0.25) == 0.0
