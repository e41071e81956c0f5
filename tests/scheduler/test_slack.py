from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.slack import AIM, ControllerConfig, pace, prompt_deadline, slack, token_deadline
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


# --- the next token's deadline -----------------------------------------------------------------------------


def test_a_token_is_due_a_target_after_the_one_before_it() -> None:
    memoryless = ControllerConfig(repay=0.0)
    for resumed in (0.0, 9.0, 10.0):
        assert token_deadline(10.0, 0.05, resumed, 5, memoryless) == pytest.approx(10.05)


def test_who_is_behind_the_pace_is_due_earlier_by_a_share_of_the_debt() -> None:
    """Two tokens since 9.9, which should have come by 9.998: 2 ms late."""
    due = token_deadline(10.0, 0.05, 9.9, 2, ControllerConfig(repay=8.0))
    assert due == pytest.approx(10.05 - (0.1 - 2 * AIM * 0.05) / 8)
    assert token_deadline(10.0, 0.05, 0.0, 2, ControllerConfig()) == pytest.approx(10.045), "a tenth at most"


def test_who_is_ahead_may_be_later_if_there_is_a_bank() -> None:
    assert token_deadline(10.0, 0.05, 9.9, 40, ControllerConfig()) == pytest.approx(10.05)
    assert token_deadline(10.0, 0.05, 9.9, 40, ControllerConfig(bank=2.0)) == pytest.approx(10.15)


def test_nothing_is_ever_due_without_a_target() -> None:
    assert token_deadline(10.0, math.inf, 9.0, 0, ControllerConfig(bank=1.0)) == math.inf


@examples(50)
@given(st.floats(0.0, 0.2), st.floats(-0.03, 0.03), st.integers(40, 200))
def test_a_debt_is_paid_back_whatever_the_bias_of_the_predictor(late: float, bias: float, stage: int) -> None:
    """Each step takes all that it may, and a little more or less; the stage as a whole meets its target."""
    tpot, control = 0.05, ControllerConfig(repay=8.0)
    last = late  # of the first token: it waited, as after a join
    for tokens in range(1, stage):
        allowed = token_deadline(last, tpot, 0.0, tokens, control) - last
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
        left -= pace(deadline, start, left, step)
        start += step
    assert start <= deadline


def test_a_prompt_that_is_late_or_never_due_has_no_pace() -> None:
    assert pace(1.0, 1.0, 100, 0.1) == 0
    assert pace(math.inf, 1.0, 100, 0.1) == 0


def test_a_prompt_due_within_the_step_is_wanted_whole() -> None:
    assert pace(1.05, 1.0, 100, 0.1) == 100
