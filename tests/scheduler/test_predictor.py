from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.predictor import Accuracy, Costs, StepLatencyModel, StepLoad
from tests.scheduler.strategies import examples

BUCKETS = {4: 0.010, 8: 0.014, 16: 0.022}
COSTS = Costs(shared_kv=1e-6, private_kv=2e-6, items=1e-4, chunk_context=1e-8)
loads = st.builds(
    StepLoad,
    st.integers(1, 16),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 40),
    st.integers(0, 10**6),
    st.integers(0, 10**5),
)

# --- predicting --------------------------------------------------------------------------------------------


def test_time_is_a_staircase_in_the_rows_and_a_line_in_the_kv() -> None:
    model = StepLatencyModel({4: 0.010, 8: 0.014}, kv_token_seconds=1e-6)
    assert model.predict(StepLoad(1)) == model.predict(StepLoad(4)) == 0.010
    assert model.predict(StepLoad(5)) == 0.014
    assert model.predict(StepLoad(4, shared_kv=400, private_kv=600)) == pytest.approx(0.011)


def test_every_part_of_a_load_has_its_price() -> None:
    model = StepLatencyModel(BUCKETS, costs=COSTS)
    load = StepLoad(5, shared_kv=1000, private_kv=500, items=7, chunk_context=20_000, raw_kv=9999)
    assert model.predict(load) == pytest.approx(0.014 + 1e-3 + 1e-3 + 7e-4 + 2e-4)
    raw = StepLatencyModel(BUCKETS, costs=Costs(raw_kv=1e-6))
    assert raw.predict(load) == pytest.approx(0.014 + 9999e-6)
    assert raw.row_line(67) == pytest.approx((67e-6, 1e-6))


@examples(100)
@given(loads, loads)
def test_what_is_beside_the_rows_adds_up(one: StepLoad, other: StepLoad) -> None:
    model = StepLatencyModel(BUCKETS, costs=Costs(shared_kv=1e-6, private_kv=2e-6, items=3e-6, raw_kv=1e-7))
    both = model.reading_seconds(one.plus(other))
    assert both == pytest.approx(model.reading_seconds(one) + model.reading_seconds(other))
    fixed, per_own = model.row_line(one.raw_kv)
    own = one.private_kv
    row = StepLoad(1, private_kv=own, items=1, raw_kv=one.raw_kv + own)
    assert fixed + per_own * own == pytest.approx(model.reading_seconds(row))


def test_a_larger_bucket_never_costs_less() -> None:
    model = StepLatencyModel({4: 0.010, 8: 0.009, 16: 0.012})
    assert [model.rows_seconds(rows) for rows in (4, 8, 16)] == [0.010, 0.010, 0.012]


def test_reading_never_saves_time() -> None:
    assert StepLatencyModel({4: 0.010}, -1e-6).predict(StepLoad(4, private_kv=1000)) == 0.010


def test_rows_may_be_priced_one_by_one() -> None:
    model = StepLatencyModel(BUCKETS, row_seconds=lambda rows: 0.01 + 0.001 * rows)
    assert [model.rows_seconds(rows) for rows in (1, 4, 5)] == pytest.approx([0.011, 0.014, 0.015])
    assert [*model.buckets] == [4, 8, 16]


def test_a_step_that_takes_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 0 seconds"):
        StepLatencyModel({4: 0.0})


# --- profiles ----------------------------------------------------------------------------------------------

PROFILE = {
    "forms": {
        "staircase": {
            "buckets": {"1": 0.010, "8": 0.012, "32": 0.02},
            "costs": {"shared_kv": 1e-6, "private_kv": 2e-6, "items": 0.0, "chunk_context": 1e-9},
            "margin": 0.03,
        },
        "linear": {"line": [0.009, 4e-4], "costs": {"raw_kv": 1e-6}, "margin": 0.2},
    }
}


def test_a_profile_gives_a_model_for_its_buckets_or_others() -> None:
    model = StepLatencyModel.from_profile(PROFILE)
    assert [*model.buckets] == [1, 8, 32]
    assert model.predict(StepLoad(3, private_kv=1000)) == pytest.approx(0.014)
    assert model.accuracy.margin == 0.03
    other = StepLatencyModel.from_profile(PROFILE, buckets=(4, 16))
    assert [other.rows_seconds(rows) for rows in (1, 4, 5, 16)] == [0.012, 0.012, 0.02, 0.02]


def test_a_profile_has_other_forms() -> None:
    model = StepLatencyModel.from_profile(PROFILE, (8,), form="linear")
    assert model.predict(StepLoad(5, private_kv=10_000, raw_kv=1000)) == pytest.approx(0.009 + 0.002 + 0.001)


def test_a_bucket_beyond_what_was_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="64 rows do not fit"):
        StepLatencyModel.from_profile(PROFILE, buckets=(8, 64))


# --- learning ----------------------------------------------------------------------------------------------


def serve(model: StepLatencyModel, truth: Callable[[StepLoad], float], steps: int, seed: int = 0) -> None:
    """Steps of all sizes that take as long as `truth` says."""
    rng = random.Random(seed)
    for _ in range(steps):
        load = StepLoad(rng.randint(1, 16), shared_kv=rng.randint(0, 9000), private_kv=rng.randint(0, 9000))
        model.observe(load, truth(load))


def fresh() -> StepLatencyModel:
    return StepLatencyModel(BUCKETS, costs=COSTS)


SMALL, LARGE = StepLoad(1), StepLoad(16, shared_kv=9000, private_kv=9000)


@pytest.mark.parametrize("late", [-0.002, 0.003, 0.02])
def test_what_the_host_adds_is_not_multiplied(late: float) -> None:
    model, real = fresh(), fresh()
    serve(model, lambda load: real.predict(load) + late, 1000)
    for load in (SMALL, LARGE):
        assert model.predict(load) == pytest.approx(real.predict(load) + late, rel=0.03)


@pytest.mark.parametrize("factor", [0.8, 1.3, 1.8])
def test_a_slower_device_is_slower_in_large_steps_and_small_ones(factor: float) -> None:
    model, real = fresh(), fresh()
    serve(model, lambda load: factor * real.predict(load), 4000)
    for load in (SMALL, LARGE):
        assert model.predict(load) == pytest.approx(factor * real.predict(load), rel=0.05)


def test_a_bucket_that_is_off_by_itself_has_an_offset_of_its_own() -> None:
    model, real = fresh(), fresh()
    serve(model, lambda load: real.predict(load) + 0.001 * (4 < load.rows <= 8), 4000)
    for rows in (4, 8, 16):
        expected = real.rows_seconds(rows) + 0.001 * (rows == 8)
        assert model.rows_seconds(rows) == pytest.approx(expected, rel=0.02)


def test_a_line_has_no_offsets_for_buckets() -> None:
    def line(rows: int) -> float:
        return 0.01 + 0.001 * rows

    model = StepLatencyModel(BUCKETS, row_seconds=line)
    serve(model, lambda load: line(load.rows) + 0.001 * (4 < load.rows <= 8), 4000)
    seconds = [model.rows_seconds(rows) for rows in (2, 4, 6, 8, 10)]
    assert [after - before for before, after in pairwise(seconds)] == pytest.approx([2e-3 * model.scale] * 4)


def test_too_low_is_corrected_faster_than_too_high() -> None:
    low, high = fresh(), fresh()
    for _ in range(StepLatencyModel.RECENT):
        low.observe(SMALL, 0.012)
        high.observe(SMALL, 0.008)
    assert low.predict(SMALL) - 0.010 > 1.5 * (0.010 - high.predict(SMALL)) > 0


@pytest.mark.parametrize(("error", "share"), [(0.0002, 0.2), (-0.0002, 0.1)])
def test_a_correction_is_a_share_of_what_recent_steps_were_off_by(error: float, share: float) -> None:
    """The bucket's own offset has taken a quarter of such a share nine times before."""
    model = fresh()
    for _ in range(StepLatencyModel.RECENT):
        assert model.offset == 0.0
        model.observe(SMALL, 0.010 + error)
    assert model.offset == pytest.approx(share * error * (1 - share / 4) ** 9)
    assert model.predict(SMALL) - 0.010 - model.offset == pytest.approx(
        error * (1 - (1 - share / 4) ** 9) + share / 4 * (error * (1 - share / 4) ** 9 - model.offset)
    )


def test_the_scale_takes_a_tenth_of_what_larger_steps_are_off_by_more() -> None:
    model = fresh()
    for _ in range(StepLatencyModel.RECENT // 2):
        model.observe(StepLoad(1), 0.010)
        model.observe(StepLoad(16), 0.022 + 0.0012)
    assert model.scale == pytest.approx(1 + 0.1 * 0.0012 / 0.012)
    assert model.offset == pytest.approx(0.2 * 0.0006 - (model.scale - 1) * 0.022)


def test_stalled_steps_move_nothing() -> None:
    model, real = fresh(), fresh()
    for step in range(600):
        stalled = step % 15 < 2
        serve(model, lambda load, stalled=stalled: 5.0 if stalled else real.predict(load), 1, seed=step)
    assert model.predict(SMALL) == pytest.approx(real.predict(SMALL), rel=0.001)
    assert model.predict(LARGE) == pytest.approx(real.predict(LARGE), rel=0.001)


def test_noise_leaves_little_bias() -> None:
    model, real, rng = fresh(), fresh(), random.Random(1)
    serve(model, lambda load: real.predict(load) * rng.gauss(1.0, 0.03), 2000)
    assert abs(model.accuracy.snapshot().bias) < 0.01
    assert model.predict(LARGE) == pytest.approx(real.predict(LARGE), rel=0.02)


@examples(50)
@given(st.lists(st.tuples(loads, st.floats(0.0, 100.0)), max_size=200))
def test_whatever_is_seen_predictions_stay_within_bounds_and_ascend(
    steps: list[tuple[StepLoad, float]],
) -> None:
    model = fresh()
    for load, seconds in steps:
        model.observe(load, seconds)
    assert 0.5 <= model.scale <= 2.0
    seconds = [model.rows_seconds(rows) for rows in range(1, 17)]
    assert all(after >= before - 1e-12 for before, after in pairwise(seconds))
    assert 0.0 < seconds[0] < 0.010 * 6.2


def test_a_larger_bucket_never_costs_less_whatever_was_seen_of_it() -> None:
    model = StepLatencyModel({4: 0.0100, 8: 0.0101})
    for _ in range(300):
        model.observe(StepLoad(4), 0.0108)
        model.observe(StepLoad(8), 0.0095)
    assert model.rows_seconds(8) >= model.rows_seconds(4) - 1e-12


def test_every_correction_has_its_bound() -> None:
    """However far off steps are: the scale, the offset, and the offset of the bucket."""
    slow, fast = fresh(), fresh()
    for _ in range(3000):
        slow.observe(StepLoad(16), 100.0)
        fast.observe(StepLoad(4), 1e-9)
    assert (slow.scale, slow.offset) == pytest.approx((2.0, 4.0 * 0.010))
    assert slow.rows_seconds(16) == pytest.approx(2.0 * 0.022 + 4.0 * 0.010 + 0.1 * 0.022)
    assert (fast.scale, fast.offset) == pytest.approx((0.5, -0.25 * 0.010))
    assert fast.rows_seconds(4) == pytest.approx(0.5 * 0.010 - 0.25 * 0.010 - 0.1 * 0.010)


# --- how well it predicts ----------------------------------------------------------------------------------


def test_the_margin_is_what_one_step_in_twenty_exceeds() -> None:
    accuracy, rng = Accuracy(0.07), random.Random(2)
    assert accuracy.margin == 0.07, "nothing is known yet"
    errors = [rng.gauss(0.01, 0.02) for _ in range(1000)]
    for error in errors:
        accuracy.observe(error)
    recent = errors[-Accuracy.WINDOW :]
    found = accuracy.snapshot()
    assert found.bias == pytest.approx(statistics.mean(recent))
    assert found.mape == pytest.approx(statistics.mean(map(abs, recent)))
    assert accuracy.margin == pytest.approx(statistics.quantiles(recent, n=20)[-1], abs=0.003)
    assert 0.91 < found.coverage < 0.98


def test_before_the_first_step_nothing_was_wrong() -> None:
    assert Accuracy(0.07).snapshot() == (0.0, 0.0, 1.0)


def test_the_margin_has_bounds() -> None:
    fast, slow = Accuracy(0.07), Accuracy(0.07)
    for _ in range(100):
        fast.observe(-0.5)
        slow.observe(3.0)
    assert (fast.margin, slow.margin) == (0.0, 0.25)


def test_a_step_is_judged_by_the_margin_that_was_kept_for_it() -> None:
    """Its own error, from which the margin follows next, does not cover it."""
    accuracy = Accuracy(0.05)
    for _ in range(Accuracy.LEAST):
        accuracy.observe(0.1)
    assert (accuracy.margin, accuracy.snapshot().coverage) == (0.1, 0.0)
    accuracy.observe(0.1)
    assert accuracy.snapshot().coverage == 1 / (Accuracy.LEAST + 1)
