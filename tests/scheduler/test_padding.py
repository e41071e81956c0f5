"""A bucket's padding is filled with branches that cost next to nothing, whatever the budget."""

from __future__ import annotations

import math
from dataclasses import replace

from scheduler.controller import Controller, ControllerConfig
from scheduler.policy import Extra
from scheduler.request import Slo
from tests.scheduler.drafts import Bench
from tests.scheduler.requests import fork, request, serial
from tests.scheduler.symbolic import TALKS_ON, rows_by_request, widths
from tests.scheduler.world import UNFILLED, Setting, serve


def test_padding_is_filled_even_without_slack() -> None:
    slo = Slo(tpot=0.00141, ttft=1.0)  # the bucket of 4 takes 1.4 ms, and the prompt 8 us
    setting = Setting(policy="taper", buckets=(4, 32), in_flight=0, prompt_floor=2)
    filled = serve([request("r", fork(6, tokens=20), slo=slo)], setting, TALKS_ON)
    narrow = serve(
        [request("r", fork(6, tokens=20), slo=slo)], replace(setting, controller=UNFILLED), TALKS_ON
    )
    assert max(widths(step)["r"] for step in filled.steps) == 4
    assert max(widths(step)["r"] for step in narrow.steps) == 1


def test_padding_is_filled_for_no_more_than_a_hundredth_of_the_target() -> None:
    """A token in the KV costs 2 us, a hundredth of the target is 14: soon a branch reads too much."""
    slo = Slo(tpot=0.00142, ttft=1.0)
    setting = Setting(policy="taper", buckets=(4, 32), in_flight=0, prompt_floor=2)
    world = serve([request("r", fork(6, tokens=20), slo=slo)], setting, TALKS_ON)
    assert {widths(step)["r"] for step in world.steps} >= {1, 4}
    for forecast in world.forecasts[1:]:  # the first one reads the prompt, and hurts nobody
        assert forecast.seconds <= forecast.baseline_seconds + 0.014e-3 + 1e-12


def test_padding_is_filled_by_the_tightest_target_of_those_in_the_step() -> None:
    """Without slack for anybody: the patient request's target is no measure for the other one."""
    setting = Setting(
        policy="taper", buckets=(4, 32), in_flight=0, prompt_floor=2, controller=ControllerConfig(rho=0.0)
    )
    load = [
        request("r", fork(6, tokens=20), slo=Slo(tpot=0.003, ttft=1.0)),
        request("patient", serial(90), slo=Slo(tpot=1.0, ttft=9.0)),
    ]
    world = serve(load, setting, TALKS_ON)
    both = [
        (widths(step)["r"], forecast.seconds - forecast.baseline_seconds)
        for step, forecast in zip(world.steps, world.forecasts, strict=True)
        if len(widths(step)) == 2 and math.isfinite(forecast.budget_seconds)
    ]
    assert {width for width, _ in both} >= {1, 3}
    assert max(added for _, added in both) <= 0.03e-3 + 1e-12


def test_a_target_that_nobody_could_keep_does_not_keep_padding_empty() -> None:
    """It is no measure of how much longer filling the bucket may make a step; nothing is, if all are so."""
    greedy, patient = Slo(tpot=1e-6, ttft=9.0), Slo(tpot=1.0, ttft=9.0)
    setting = Setting(buckets=(4, 32), prompt_floor=2, in_flight=0, controller=ControllerConfig(rho=0.0))
    for slo, rows in ((patient, 4), (greedy, 2)):
        load = [request("greedy", fork(3, tokens=20), slo=greedy), request("other", serial(30), slo=slo)]
        world = serve(load, setting, TALKS_ON)
        both = [sum(by.values()) for by in map(rows_by_request, world.steps) if len(by) == 2]
        assert max(both[4:]) == rows


def test_padding_is_filled_with_the_cheapest_branches() -> None:
    controller = Controller(Bench().latency)
    draft = Bench().draft()
    extras = [Extra(number, 0, 1, seconds) for number, seconds in enumerate((5.0, 1.0, 4.0, 2.0, 3.0))]
    draft.baseline = 100.0
    assert controller.filled(draft, extras) == 110.0, "the bucket of the baseline has room for four"
    assert controller.filled(draft, [Extra(0, 0, 3, 1.0), Extra(1, 0, 2, 2.0), Extra(2, 0, 1, 3.0)]) == 101.0
