"""What a step may cost, by the most urgent request; and how the controller learns what steps cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from scheduler.controller import Controller
from scheduler.predictor import StepLoad
from scheduler.request import Slo
from scheduler.step import Entry, Forecast, Step
from tests.scheduler.drafts import Bench
from tests.scheduler.requests import fork, request, serial
from tests.scheduler.symbolic import TALKS_ON, unique_kv_tokens, widths
from tests.scheduler.world import UNFILLED, Setting, World


def cost(world: World, entries: Sequence[Entry]) -> float:
    """An independent account of a step's seconds."""
    rows = sum(entry.rows for entry in entries)
    bucket = min(bucket for bucket in world.setting.buckets if bucket >= rows)
    return 1e-3 + 1e-4 * bucket + 2e-6 * unique_kv_tokens(entries, world.setting.page_size)


def first_of_each(step: Step) -> list[Entry]:
    """The baseline, where everybody has one row: it is planned first."""
    return [*{entry.request_id: entry for entry in reversed(step.entries)}.values()]


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize(
    ("policy", "rho"), [("off", 0.8), ("cap:2", 0.8), ("eager", 0.8), ("taper", 0.8), ("taper", None)]
)
def test_the_budget_is_what_the_most_urgent_request_can_spare(
    policy: str, rho: float | None, in_flight: int
) -> None:
    """Recomputed from the plan's entries and the times of the tokens, for requests that all decode."""
    slos = {"a": 0.0042, "b": 0.0031, "c": 0.0055}
    buckets = (2, 4, 8, 16, 32)
    controller = replace(UNFILLED, rho=rho)
    world = World(
        Setting(policy=policy, in_flight=in_flight, controller=controller, buckets=buckets), TALKS_ON
    )
    for name, stage in (("a", fork(8, tokens=30)), ("b", serial(60)), ("c", fork(9, tokens=30))):
        world.add(request(name, stage, slo=Slo(tpot=slos[name], ttft=9.0), prompt=6))
    world.run_until(lambda: all(world.emitted(name) >= 3 for name in slos))
    over = 0
    for _ in range(25):
        start = world.now + sum(scheduled.forecast.seconds for scheduled in world.flying)
        margin = world.scheduler.controller.latency.accuracy.margin
        scheduled = world.launch()
        assert scheduled is not None
        forecast, entries = scheduled.forecast, scheduled.step.entries
        t0 = cost(world, first_of_each(scheduled.step))
        assert forecast.baseline_seconds == pytest.approx(t0)
        assert forecast.seconds == pytest.approx(cost(world, entries))
        last = start if in_flight else world.now  # everybody has a token in every step
        left = min([last + tpot - start for tpot in slos.values() if last + tpot - start >= t0], default=t0)
        spare = max(0.0, left / (1.0 + margin) - t0) if rho is None else rho * (left - t0)
        assert forecast.budget_seconds == pytest.approx(t0 + spare)
        over += forecast.seconds > forecast.budget_seconds + 1e-12
        world.land()
    assert over == (25 if policy == "eager" else 0)


def test_a_request_that_must_wait_is_the_most_urgent() -> None:
    """Its deadline is that of its last token, whoever else has had one since."""
    world = World(Setting(policy="taper", in_flight=0, controller=UNFILLED, buckets=(2, 16)), TALKS_ON)
    world.add(request("wide", fork(8, tokens=40), slo=Slo(tpot=0.006, ttft=9.0)))
    world.add(request("other", serial(40), slo=Slo(tpot=0.006, ttft=9.0)))
    world.run_until(lambda: world.emitted("other") > 2)
    world.now += 0.0035  # a stall: 2.5 ms are left, the bucket of 16 takes 2.6
    scheduled = world.launch()
    assert scheduled is not None
    assert scheduled.step.bucket == 2
    t0 = scheduled.forecast.baseline_seconds
    assert scheduled.forecast.budget_seconds == pytest.approx(t0 + 0.8 * (0.0025 - t0))


def test_a_prompt_that_is_due_narrows_the_branches() -> None:
    def width(ttft: float) -> int:
        setting = Setting(buckets=(2, 8, 16), in_flight=0, controller=UNFILLED, prompt_floor=1, max_chunk=4)
        world = World(setting, TALKS_ON)
        world.add(request("wide", fork(12, tokens=40), slo=Slo(tpot=0.02, ttft=9.0)))
        world.run_until(lambda: world.emitted("wide") > 12)
        world.add(request("prompt", serial(1), prompt=41, slo=Slo(tpot=1.0, ttft=ttft)))
        world.step()
        return widths(world.steps[-1])["wide"]

    assert width(ttft=9.0) == 12
    # 40 tokens in 10 chunks leave 2.2 ms for each. The bucket of 16 takes 2.6; that of 8 has room for a chunk
    # of 4 and for 4 branches.
    assert width(ttft=0.022) == 4


def test_where_everybody_is_late_a_prompt_that_is_not_gives_no_slack() -> None:
    setting = Setting(policy="taper", in_flight=0, controller=UNFILLED, max_chunk=4)
    world = World(setting, TALKS_ON)
    world.add(request("wide", fork(6, tokens=20), slo=Slo(tpot=9.0, ttft=9.0)))
    world.add(request("reading", serial(1), prompt=120, slo=Slo(tpot=1.0, ttft=900.0)))
    world.run_until(lambda: world.emitted("wide") > 3)
    assert world.forecasts[-1].budget_seconds > 2 * world.forecasts[-1].baseline_seconds
    world.now += 90.0  # a stall
    scheduled = world.launch()
    assert scheduled is not None
    assert widths(scheduled.step)["wide"] == 1
    assert scheduled.forecast.budget_seconds == scheduled.forecast.baseline_seconds


def test_a_late_request_does_not_narrow_the_others() -> None:
    setting = Setting(policy="taper", buckets=(2, 4, 8, 16), in_flight=0, controller=UNFILLED, prompt_floor=2)
    world = World(setting, TALKS_ON)
    world.add(request("wide", fork(8, tokens=40), slo=Slo(tpot=0.01, ttft=9.0)))
    world.add(request("doomed", serial(40), slo=Slo(tpot=0.0019, ttft=9.0)))
    world.run_until(lambda: world.emitted("doomed") > 2)
    assert widths(world.steps[-1])["wide"] == 3
    world.now += 0.005  # a stall
    world.step()
    assert widths(world.steps[-1])["wide"] == 8
    world.step()
    assert widths(world.steps[-1])["wide"] == 3


def test_the_controller_learns_from_what_steps_took() -> None:
    controller = Controller(Bench().latency)
    load = StepLoad(4, private_kv=10)
    before = controller.latency.predict(load)
    forecast = Forecast(load, before, before, before, ())
    for _ in range(200):
        controller.learn(forecast, 1.2 * before)
    assert controller.latency.predict(load) == pytest.approx(1.2 * before, rel=0.01)


def test_the_controller_hears_of_every_step() -> None:
    world = World(Setting(late_by=1.2), TALKS_ON)
    world.add(request("r", serial(20)))
    world.run_until(lambda: world.emitted("r") == 20)
    assert world.scheduler.controller.latency.accuracy.snapshot().bias > 0.01
