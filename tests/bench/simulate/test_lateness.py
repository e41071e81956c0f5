from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest

from bench.simulate.lateness import ENOUGH, MOST, Lateness
from bench.simulate.profile import Profile
from scheduler.predictor import StepLoad
from serve.door import StepRecord

PROFILE = Profile.load("h200-qwen3-32b").exact()
DEVICE = PROFILE.latency()


def logged(ratios: Sequence[float], rows: int = 8) -> list[StepRecord]:
    """Steps that took so many times what the device takes, whatever the server had learned to predict."""
    load = StepLoad(rows, private_kv=1000 * rows)
    took = DEVICE.predict(load)
    return [StepRecord(1.0, rows, load, 2, 3, 0, 7.0, 6.0, None, ratio * took) for ratio in ratios]


def test_what_goes_with_the_size_of_a_step_is_told_apart_from_what_does_not() -> None:
    steps = logged([1.0, 1.2] * ENOUGH) + logged([2.0, 2.4] * ENOUGH, rows=64)
    found = Lateness.of(steps, PROFILE)
    assert (found.factors[8], found.factors[64]) == (pytest.approx(1.1), pytest.approx(2.2))
    assert found.factors[8] < found.factors[512] < found.factors[64], (
        "where there was none: that of all steps"
    )
    assert found.steps == 1
    assert found.excess[:2] == found.excess[-2:] == pytest.approx([-1 / 11, 1 / 11], abs=1e-3)


def test_of_a_long_run_a_few_hundred_numbers_are_kept_that_take_as_long() -> None:
    """Every step made up for the one before it, and the last third was slow."""
    steps = logged([1.5, 0.5] * 1000 + [2.0] * 1000)
    found = Lateness.of(steps, PROFILE)
    assert (found.steps, len(found.excess)) == (8, 375)
    assert len(found.excess) <= MOST
    quick, slow = found.excess[:250], found.excess[250:]
    assert quick == pytest.approx([1 / (4 / 3) - 1] * 250, abs=1e-3)
    assert slow == pytest.approx([2 / (4 / 3) - 1] * 125, abs=1e-3)


def test_a_simulations_steps_are_as_late() -> None:
    found = Lateness.of(logged([1.0, 1.2] * 1000), PROFILE)
    kept = Lateness.of_json(json.loads(json.dumps(asdict(found))))
    assert kept == found
    late = kept.on(PROFILE)
    assert late.factors == found.factors
    assert len(late.excess) == found.steps * len(found.excess)
    assert late.excess[: found.steps] == (found.excess[0],) * found.steps


def test_beyond_one_profile_is_not_beyond_another() -> None:
    found = Lateness.of(logged([1.0]), PROFILE)
    with pytest.raises(
        ValueError, match=r"beyond profile h200-qwen3-32b \w{8} says nothing about other \w{8}"
    ):
        found.on(replace(PROFILE, name="other"))
    staircase = PROFILE.forms["staircase"]
    again = replace(PROFILE, forms={"staircase": staircase | {"margin": staircase["margin"] + 0.01}})
    with pytest.raises(ValueError, match="says nothing about"):
        found.on(again)


def test_steps_that_the_profile_does_not_know_say_nothing() -> None:
    with pytest.raises(ValueError, match="no step of this run"):
        Lateness.of([], PROFILE)
    (step,) = logged([1.0], rows=512)
    with pytest.raises(ValueError, match="no step as large"):
        Lateness.of([step._replace(load=StepLoad(513))], PROFILE)
