from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from bench.load.workload import open_loop
from bench.simulate import ablations
from bench.simulate.ablations import VARIATIONS, Replanned, Unbudgeted, ablate, unpadded
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, Simulation, targets
from scheduler.config import RESERVE
from scheduler.policy import Baseline, Extra
from scheduler.predictor import StepLatencyModel, StepLoad
from tests.bench.simulate.in_one_process import InOneProcess

PROFILE = Profile.load("h200-qwen3-32b")
EXTRAS = [Extra(number, 0, 1, 0.0) for number in range(6)]
FEW = tuple(VARIATIONS)[::4]
LATENCY = StepLatencyModel({4: 0.010, 16: 0.020})


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(VARIATIONS), marks=pytest.mark.full)])
def test_every_variation_answers_everything_in_full(names: tuple[str, ...]) -> None:
    workload = open_loop("mixed", "poisson", 8.0, 1.0, seed=3).scaled(0.12)
    assert any(item.parallel for item in workload.items)
    setting = Setting(profile=PROFILE, workload=workload, slo=targets(PROFILE))
    rows = [ablate(setting, name) for name in names]
    assert [row["policy"] for row in rows] == [*names]
    assert all(row["ttft_attainment"] == 1.0 for row in rows)
    assert len({row["e2e_p50_s"] for row in rows}) > len(names) / 4


def test_the_command_reserves_what_it_is_told_but_where_that_is_what_varies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reserved: list[float] = []

    def begin(setting: Setting, policy: str, **options: Any) -> Simulation:
        reserved.append(setting.reserve)
        return Simulation(setting, policy, **options)

    monkeypatch.setattr(ablations, "Simulation", begin)
    monkeypatch.setattr(ablations, "in_processes", InOneProcess)
    monkeypatch.setattr(ablations, "COOLDOWN", 0.0)
    short = ["--workload", "light", "--warmup", "0", "--window", "0.5", "--variations"]
    found = [
        ablations.main([*short, "full", "KV not reserved", *options])
        for options in ([], ["--reserve", "0.5"])
    ]
    assert [each["reserve"] for each in found] == [RESERVE, 0.5]
    assert reserved == [RESERVE, 0.0, 0.5, 0.0]


def test_a_plan_that_is_kept_admits_as_many_until_the_next() -> None:
    policy = Replanned(3)
    budgets = [0.010, 0.020, 0.020, 0.020, 0.010]
    admitted = [len(policy.admit(EXTRAS, Baseline(2, 0.0, budget), LATENCY)) for budget in budgets]
    assert admitted == [2, 2, 2, 6, 6]


def test_without_a_budget_all_run_that_fit() -> None:
    assert len(Unbudgeted().admit(EXTRAS, Baseline(2, 0.0, 0.001), LATENCY)) == 6


def test_without_padding_in_the_price_a_bucket_just_begun_costs_less() -> None:
    seconds = PROFILE.bucket_seconds
    smaller, bucket = max(pairwise(seconds), key=lambda pair: seconds[pair[1]] - seconds[pair[0]])
    load = StepLoad(smaller + 1, shared_kv=30_000, private_kv=20_000, items=110, raw_kv=200_000)
    assert unpadded(PROFILE).predict(load) < PROFILE.latency().predict(load)
    full = load._replace(rows=bucket)
    assert unpadded(PROFILE).predict(full) == pytest.approx(PROFILE.latency().predict(full))
