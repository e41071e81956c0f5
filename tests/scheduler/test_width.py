"""Who advances in a step, and with how many branches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given

from scheduler.program import BranchSpec, ParallelStage
from scheduler.request import Request, Slo
from scheduler.step import Step
from tests.scheduler.alphabet import LETTERS, PLAIN
from tests.scheduler.requests import fork, request, serial, stopping
from tests.scheduler.strategies import examples, loads, plans, serving
from tests.scheduler.symbolic import TALKS_ON, SymbolicModel, widths
from tests.scheduler.world import UNFILLED, Setting, World, roomy, serve

MODEL = SymbolicModel(PLAIN)
NEVER = Slo(tpot=math.inf, ttft=math.inf)


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("policy", ["off", "cap:2", "eager", "taper"])
def test_every_decoding_request_advances_in_every_step(policy: str, in_flight: int) -> None:
    world = World(Setting(policy=policy, in_flight=in_flight), TALKS_ON)
    for name in "abc":
        world.add(request(name, fork(3, tokens=20)))
    world.run_until(lambda: all(world.emitted(name) for name in "abc"))
    for _ in range(12):
        scheduled = world.launch()
        assert scheduled is not None
        assert set(widths(scheduled.step)) == {"a", "b", "c"}
        world.land()


def test_a_branch_with_much_to_read_leaves_a_row_for_everybody() -> None:
    """Each begins with more rows than its share of the bucket."""
    spec = BranchSpec(stopping=stopping(9), prefix=LETTERS[:1])
    stages = (serial(3), ParallelStage(branches=(spec,) * 3, join="none"))
    world = World(Setting(policy="eager", buckets=(4,), prompt_floor=2), TALKS_ON)
    for name in "abcd":
        world.add(request(name, *stages, prompt=1))
    world.run_until(lambda: all(world.scheduler.live[name].prompt_read for name in "abcd"))
    while not world.scheduler.idle:
        ready = {live.request.id for live in world.scheduler.running if live.runnable()}
        scheduled = world.launch()
        assert set(widths(scheduled.step) if scheduled else ()) == ready
        world.land()


def test_at_width_one_branches_take_turns() -> None:
    world = serve([request("r", fork(3, tokens=5))], Setting(policy="off", in_flight=0), TALKS_ON)
    turns = [entry.branch for step in world.steps for entry in step.entries if entry.samples]
    assert turns == [1, 2, 3] * 5


def test_a_cap_is_the_number_of_branches_that_advance() -> None:
    world = serve([request("r", fork(4, tokens=8))], Setting(policy="cap:3", in_flight=0), TALKS_ON)
    assert [widths(step)["r"] for step in world.steps[1:9]] == [3] * 8


@pytest.mark.parametrize(
    ("policy", "priority", "expected"),
    [
        ("taper", 5, {"old": 4, "young": 1}),
        ("taper:priority", 5, {"old": 1, "young": 4}),
        ("taper:priority", 0, {"old": 4, "young": 1}),
        ("taper:priority", -5, {"old": 4, "young": 1}),
    ],
)
def test_the_budget_goes_to_the_most_urgent_request(
    policy: str, priority: int, expected: dict[str, int]
) -> None:
    """The step has room for three branches more than one of each."""
    world = World(Setting(policy=policy, buckets=(5,), in_flight=0), TALKS_ON)
    world.add(request("old", fork(4, tokens=30)))
    world.add(request("young", fork(4, tokens=30), priority=priority))
    world.run_until(lambda: world.emitted("old") > 1 and world.emitted("young") > 1)
    assert world.running == ["old", "young"], "who starts first is not its business"
    for _ in range(5):
        world.step()
        assert widths(world.steps[-1]) == expected


@pytest.mark.parametrize("tpot", [1e-9, 0.0011])
def test_if_everybody_is_late_the_width_is_one(tpot: float) -> None:
    slo = Slo(tpot=tpot, ttft=1e-9)
    world = serve([request("r", fork(6), slo=slo)], Setting(policy="taper", controller=UNFILLED), TALKS_ON)
    assert {widths(step)["r"] for step in world.steps} == {1}


def shape(step: Step) -> list[tuple[str, int, int, bool]]:
    """Without ids, which are given in the order of arrival."""
    return sorted((entry.request_id, entry.start, entry.rows, entry.samples) for entry in step.entries)


@examples(60)
@given(loads(plans), serving)
def test_without_targets_taper_is_eager(load: list[Request], setting: Setting) -> None:
    """As long as the largest bucket holds everybody: what they leave out beyond that is a matter of taste."""
    setting = roomy(load, replace(setting, buckets=(4, 64)))
    load = [replace(request, slo=NEVER) for request in load]
    taper, eager = (serve(load, replace(setting, policy=name), MODEL) for name in ("taper", "eager"))
    if all(step.rows < 64 for step in eager.steps):
        assert [shape(step) for step in taper.steps] == [shape(step) for step in eager.steps]


def test_a_branch_with_more_to_read_than_the_floor_waits_for_its_turn() -> None:
    specs = tuple(BranchSpec(stopping=stopping(6), prefix=LETTERS[:1] * rows) for rows in (1, 10, 10))
    stage = ParallelStage(branches=specs, join="none")
    world = serve([request("r", stage)], Setting(policy="eager", in_flight=0), TALKS_ON)
    assert max(entry.rows for step in world.steps[1:] for entry in step.entries) == 4
    widest = max(world.steps[1:], key=lambda step: step.rows)
    assert widest.rows <= 4 + 2 + 1, "one that reads, the rest of another, and one that decodes"


def test_a_branch_that_does_not_fit_whole_is_left_out() -> None:
    spec = BranchSpec(stopping=stopping(6), prefix=LETTERS[:3])
    stage = ParallelStage(branches=(spec,) * 4, join="none")
    world = World(Setting(policy="eager", buckets=(8,), in_flight=0), TALKS_ON)
    world.add(request("r", serial(1), stage))
    world.run_until(lambda: world.emitted("r") == 1)
    world.step()
    assert [entry.rows for entry in world.steps[-1].entries] == [1, 3, 3]
    world.run([])
