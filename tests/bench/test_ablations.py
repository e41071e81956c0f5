from __future__ import annotations

import pytest

from bench.ablations import VARIATIONS, Replanned, Unbudgeted, ablate, fitted, unpadded
from bench.simulate import Profile, Setting, unloaded_tpot
from bench.workload import open_loop
from scheduler.policy import Baseline, Extra
from scheduler.predictor import StepLatencyModel, StepLoad

PROFILE = Profile.load("h200-qwen3-32b")
EXTRAS = [Extra(number, 0, 1, 0.0) for number in range(6)]
LATENCY = StepLatencyModel({4: 0.010, 16: 0.020})


def test_every_variation_answers_everything_in_full() -> None:
    workload = open_loop("mixed", "poisson", 2.0, 1.0, seed=3)
    assert any(item.parallel for item in workload.items)
    setting = Setting(profile=PROFILE, workload=workload, tpot_slo=2 * unloaded_tpot(PROFILE))
    rows = [ablate(setting, name) for name in VARIATIONS]
    assert [row["policy"] for row in rows] == [*VARIATIONS]
    assert all(row["ttft_attainment"] == 1.0 for row in rows)
    assert len({row["e2e_p50_s"] for row in rows}) > 4


def test_a_plan_that_is_kept_admits_as_many_until_the_next() -> None:
    policy = Replanned(3)
    budgets = [0.010, 0.020, 0.020, 0.020, 0.010]
    admitted = [len(policy.admit(EXTRAS, Baseline(2, 0.0, budget), LATENCY)) for budget in budgets]
    assert admitted == [2, 2, 2, 6, 6]


def test_without_a_budget_all_run_that_fit() -> None:
    assert len(Unbudgeted().admit(EXTRAS, Baseline(2, 0.0, 0.001), LATENCY)) == 6


def test_the_forms_are_fitted_to_what_the_profile_says() -> None:
    load = StepLoad(100, shared_kv=30_000, private_kv=20_000, items=110, raw_kv=200_000)
    truth = PROFILE.latency().predict(load)
    assert fitted("staircase", PROFILE).predict(load) == pytest.approx(truth, rel=0.01)
    assert fitted("linear", PROFILE).predict(load) != pytest.approx(truth, rel=0.1)
    assert unpadded(PROFILE).predict(load) < truth
