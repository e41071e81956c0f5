from __future__ import annotations

import math

import pytest

from scheduler.pace import Pace
from scheduler.request import Slo
from scheduler.slack import AIM


def started(tpot: float = 0.05, ttft: float = 5.0) -> Pace:
    """Arrived at 10, started at 11, first token at 12."""
    pace = Pace(Slo(tpot=tpot, ttft=ttft), 10.0)
    pace.start(11.0)
    assert pace.sample(12.0)
    pace.token(12.0)
    return pace


def test_the_first_sample_alone_is_the_first() -> None:
    assert not started().sample(12.1)


def test_a_prompt_is_due_by_the_target_of_its_first_token_and_anew_after_a_preemption() -> None:
    pace = Pace(Slo(tpot=0.05, ttft=5.0), 10.0)
    pace.start(11.0)
    assert pace.reading_deadline == pace.ttft_deadline == 15.0
    pace.sample(12.0)
    pace.start(30.0)
    assert pace.reading_deadline == 35.0
    assert pace.ttft_deadline == 15.0


def test_the_next_token_is_due_a_target_after_the_last_one_or_the_expected_one() -> None:
    pace = started()
    assert pace.next_token(repay=0.0) == pytest.approx(12.05)
    assert pace.next_token(repay=0.0, emission=12.03) == pytest.approx(12.08)


def test_after_a_preemption_the_next_token_is_due_a_target_after_the_return() -> None:
    pace = started()
    pace.start(20.0)
    assert pace.next_token(repay=0.0) == pytest.approx(20.05)


def test_a_request_is_ahead_of_its_pace_by_the_tokens_since_it_resumed() -> None:
    pace = started()
    for at in (12.04, 12.08):
        pace.sample(at)
        pace.token(at)
    assert pace.ahead() == pytest.approx(12.0 + 3 * AIM * 0.05 - 12.08)
    assert pace.ahead(emission=12.2) == pytest.approx(12.0 + 4 * AIM * 0.05 - 12.2)
    pace.branch()
    assert pace.ahead() == pytest.approx(0.0), "a fork or a join begins anew, at the newest sample"


def test_before_its_first_token_a_request_is_as_late_as_the_expected_one() -> None:
    pace = Pace(Slo(tpot=0.05, ttft=5.0), 0.0)
    pace.start(0.25)
    assert pace.ahead(emission=0.5) == pytest.approx(0.25 + AIM * 0.05 - 0.5)
    assert pace.next_token(repay=0.0, emission=0.5) == pytest.approx(0.55)


def test_a_debt_is_repaid() -> None:
    pace = started()
    assert pace.next_token(repay=8.0, emission=12.3) < 12.35
    assert pace.next_token(repay=0.0, emission=12.3) == pytest.approx(12.35)


def test_without_a_target_nothing_is_due() -> None:
    assert started(tpot=math.inf).next_token(repay=8.0) == math.inf


def test_what_it_came_to() -> None:
    pace = started(tpot=0.05, ttft=2.0)
    for at in (12.04, 12.1):
        pace.sample(at)
        pace.token(at)
    pace.start(20.0)  # measures never restart
    pace.sample(21.0)  # ends it, and is no token
    timing = pace.timing()
    assert (timing.queue, timing.ttft, timing.total) == (1.0, 2.0, 11.0)
    assert timing.tpot == pytest.approx(0.05)
    assert timing.ttft_slo_met
    late = started(ttft=1.9).timing()
    assert (late.ttft_slo_met, late.tpot, late.tpot_slo_met) == (False, 0.0, True)


def test_a_target_that_is_just_met_is_met() -> None:
    pace = started(tpot=0.5, ttft=2.0)
    pace.sample(12.5)
    pace.token(12.5)
    timing = pace.timing()
    assert (timing.tpot, timing.tpot_slo_met, timing.ttft_slo_met) == (0.5, True, True)


def test_who_never_had_a_sample_waited_in_the_queue_alone() -> None:
    pace = Pace(Slo(), 10.0)
    pace.start(11.0)
    timing = pace.timing()
    assert (timing.queue, timing.ttft, timing.tpot, timing.total) == (1.0, 0.0, 0.0, 1.0)
