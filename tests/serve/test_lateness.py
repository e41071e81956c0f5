"""A late step has one cause, and what explains it decides which."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.door import StepRecord
from serve.lateness import CAUSES, LATE, Cause, cause_of_lateness
from tests.scheduler.strategies import examples
from tests.serve import fakes

STEP = fakes.STEP._replace(ended=10.0, planned=9.975)
NEXT = STEP._replace(ended=10.020, seconds=0.020, planned=9.999)

seconds = st.floats(0.0, 1.0)
steps = st.builds(
    lambda *fields: STEP._replace(
        **dict(
            zip(("predicted", "seconds", "idle", "paused", "ready", "planned", "ended"), fields, strict=True)
        )
    ),
    *[seconds] * 4,
    st.booleans(),
    seconds,
    seconds,
)


def test_each_cause_is_found_where_it_explains_the_step() -> None:
    assert cause_of_lateness(STEP) == cause_of_lateness(STEP, NEXT) == "device"
    assert cause_of_lateness(STEP._replace(idle=0.0051), NEXT) == "launch"
    assert cause_of_lateness(STEP._replace(ready=True), NEXT) == "seen"
    assert cause_of_lateness(STEP._replace(paused=0.0051), NEXT) == "paused"
    assert cause_of_lateness(STEP._replace(seconds=0.0229)) is None


def test_a_cause_that_explains_less_than_half_is_none() -> None:
    assert cause_of_lateness(STEP._replace(idle=0.0049, paused=0.0049), NEXT) == "device"
    assert cause_of_lateness(STEP._replace(idle=0.0049, ready=True)) == "seen"


def test_what_the_next_step_makes_up_was_seen_late() -> None:
    short = NEXT._replace(seconds=0.012)
    assert cause_of_lateness(STEP, short) == "seen"
    assert cause_of_lateness(STEP, short._replace(planned=10.001)) == "device", "it began afresh"
    assert cause_of_lateness(STEP, short._replace(seconds=0.016)) == "device", "only a little of it"
    assert cause_of_lateness(STEP._replace(idle=0.008), short) == "launch", "the device had waited"


def test_nothing_is_late_without_a_prediction() -> None:
    assert cause_of_lateness(STEP._replace(predicted=0.0), NEXT) is None


@examples(200)
@given(steps, st.none() | steps)
def test_a_step_has_a_cause_exactly_if_it_is_late(step: StepRecord, following: StepRecord | None) -> None:
    cause = cause_of_lateness(step, following)
    assert (cause is not None) == (step.predicted > 0 and step.seconds > LATE * step.predicted)
    assert cause is None or cause in get_args(Cause) == CAUSES


@examples(200)
@given(steps, st.none() | steps)
def test_only_what_was_seen_late_depends_on_the_next_step(
    step: StepRecord, following: StepRecord | None
) -> None:
    alone, known = cause_of_lateness(step), cause_of_lateness(step, following)
    assert alone == known or (alone, known) == ("device", "seen")


@examples(200)
@given(steps, st.none() | steps, st.sampled_from(("idle", "paused")), seconds)
def test_more_of_a_cause_leads_to_no_cause_that_weighs_less(
    step: StepRecord, following: StepRecord | None, field: str, more: float
) -> None:
    """A pause weighs more than a launch, and that more than how the result was seen."""
    weight = {"device": 0, "seen": 1, "launch": 2, "paused": 3, None: -1}
    added = step._replace(**{field: getattr(step, field) + more})
    assert weight[cause_of_lateness(added, following)] >= weight[cause_of_lateness(step, following)]


@pytest.mark.parametrize("factor", [1e-3, 7.0])
@examples(100)
@given(steps, st.none() | steps)
def test_the_unit_of_time_does_not_matter(
    factor: float, step: StepRecord, following: StepRecord | None
) -> None:
    """But for what floats round where a share is met exactly."""

    def scaled(record: StepRecord) -> StepRecord:
        names = ("predicted", "seconds", "idle", "paused", "planned", "ended")
        return record._replace(**{name: factor * getattr(record, name) for name in names})

    after = following and scaled(following)
    if not _on_an_edge(step, following):
        assert cause_of_lateness(scaled(step), after) == cause_of_lateness(step, following)


def _on_an_edge(step: StepRecord, following: StepRecord | None) -> bool:
    enough = (step.seconds - step.predicted) / 2
    pairs = [(step.seconds, LATE * step.predicted), (step.idle, enough), (step.paused, enough)]
    if following is not None:
        pairs += [(following.predicted - following.seconds, enough), (following.planned, step.ended)]
    return any(left == pytest.approx(right, rel=1e-9, abs=1e-12) for left, right in pairs)
