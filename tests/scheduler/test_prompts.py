"""When prompts are read: a floor in every step, at the pace of their targets, the most urgent first."""

from __future__ import annotations

import math

from scheduler.controller import Controller, ControllerConfig, Turn
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.program import BranchSpec, ParallelStage
from scheduler.request import Slo
from tests.scheduler.alphabet import LETTERS
from tests.scheduler.drafts import Bench
from tests.scheduler.requests import request, serial, stopping
from tests.scheduler.symbolic import TALKS_ON, rows_by_request
from tests.scheduler.world import UNFILLED, Setting, World, serve

FLOOR_ONLY = ControllerConfig(rho=0.0, fill=False)
TWO_A_STEP = Setting(  # tokens of one prompt
    policy="off", buckets=(8,), prompt_floor=2, max_chunk=2, controller=FLOOR_ONLY, in_flight=0
)


def test_the_floor_is_at_most_half_of_the_largest_bucket() -> None:
    def floor(prompt_floor: int, largest: int) -> int:
        config = ControllerConfig(prompt_floor=prompt_floor)
        return Controller(StepLatencyModel({largest: 0.01}), "off", config).floor

    assert [floor(32, 64), floor(32, 8), floor(32, 1), floor(0, 8)] == [32, 4, 1, 1]


def test_the_floor_of_prompts_grows_with_what_the_targets_leave() -> None:
    """Buckets of 4, 8 and 16 rows take 1.4, 1.8 and 2.6 ms."""
    seconds = {4: 1.4e-3, 8: 1.8e-3, 16: 2.6e-3}
    controller = Controller(StepLatencyModel(seconds), "off", ControllerConfig(prompt_floor=8))

    def rows(forced: int, longest: float) -> int:
        return controller.floor_rows(StepLoad(forced), longest)

    assert [rows(3, longest) for longest in (1.5e-3, 1.9e-3, 2.7e-3, math.inf)] == [1, 5, 8, 8]
    assert rows(4, 1.5e-3) == 4, "the least that one token costs holds three more"
    assert rows(4, 1.3e-3) == 8, "holding prompts back would save nobody"
    assert rows(16, 1.0) == 8, "the draft has no room for them"


def test_a_prompt_reads_a_little_in_every_step_whatever_the_slack() -> None:
    world = World(Setting(policy="eager", buckets=(4, 8, 32), prompt_floor=4, late_by=1.2), TALKS_ON)
    world.add(request("decoding", serial(90), slo=Slo(tpot=0.0025, ttft=9.0)))
    world.run_until(lambda: world.emitted("decoding") > 3)
    world.add(request("reading", serial(1), prompt=60, slo=Slo(tpot=1.0, ttft=1e-6)))
    world.now += 1.0  # it has missed its target, and the other one is about to be late
    world.run_until(lambda: world.running == ["decoding", "reading"])
    start = len(world.steps) - 1
    world.run_until(lambda: world.emitted("reading") > 0)
    read = [rows_by_request(step)["reading"] for step in world.steps[start:]]
    assert min([rows for rows in read if rows][:-1]) >= 4
    assert len(read) <= 17


def test_the_prompt_that_is_due_first_has_the_floor() -> None:
    world = World(TWO_A_STEP, TALKS_ON)
    world.add(request("decoding", serial(99), slo=Slo(tpot=0.0030, ttft=9.0)))
    world.run_until(lambda: world.emitted("decoding") > 3)
    world.add(request("relaxed", serial(1), prompt=30, slo=Slo(tpot=1.0, ttft=20.0)))
    world.add(request("urgent", serial(1), prompt=30, slo=Slo(tpot=1.0, ttft=10.0)))
    world.run_until(lambda: world.emitted("urgent") + world.emitted("relaxed") > 0, most=40)
    assert (world.emitted("urgent"), world.emitted("relaxed")) == (1, 0)
    assert world.running == ["decoding", "relaxed"]


def test_a_prompt_that_missed_its_target_is_not_starved_by_those_that_have_not() -> None:
    world = World(TWO_A_STEP, TALKS_ON)
    world.add(request("decoding", serial(150), slo=Slo(tpot=0.0030, ttft=9.0)))
    world.add(request("late", serial(1), prompt=20, slo=Slo(tpot=1.0, ttft=0.0001)))
    for number in range(5):
        world.add(request(f"live{number}", serial(1), prompt=60, slo=Slo(tpot=1.0, ttft=90.0)))
    world.run_until(lambda: world.emitted("late") > 0, most=100)
    assert world.emitted("live4") == 0


def test_the_floor_goes_to_a_prompt_that_can_be_in_time_but_for_one_step_in_eight() -> None:
    world = World(TWO_A_STEP, TALKS_ON)
    world.add(request("decoding", serial(150), slo=Slo(tpot=0.0030, ttft=9.0)))
    world.run_until(lambda: world.emitted("decoding") > 2)
    world.add(request("late", serial(1), prompt=90, slo=Slo(tpot=1.0, ttft=0.0001)))
    world.add(request("live", serial(1), prompt=90, slo=Slo(tpot=1.0, ttft=90.0)))
    world.step()
    for _ in range(20):
        world.step()
        step = world.steps[-1]
        reader = "live" if step.step_id % 8 else "late"
        assert rows_by_request(step) == {"decoding": 1, reader: 2}


def test_there_is_a_row_for_a_prompt_beside_branches_with_much_to_read() -> None:
    spec = BranchSpec(stopping=stopping(9), prefix=LETTERS[:1] * 4)
    stages = (serial(3), ParallelStage(branches=(spec,) * 3, join="none"))
    world = World(Setting(policy="off", buckets=(8,), prompt_floor=4, in_flight=0), TALKS_ON)
    for name in "ab":
        world.add(request(name, *stages, prompt=1))
    world.run_until(lambda: world.emitted("a") == world.emitted("b") == 3)
    world.add(request("reading", serial(1), prompt=60))
    for _ in range(4):
        world.step()
        assert set(rows_by_request(world.steps[-1])) == {"a", "b", "reading"}


def test_prompts_are_read_at_the_pace_of_their_target_and_faster_if_there_is_slack() -> None:
    def steps(ttft: float, tpot: float) -> int:
        setting = Setting(
            policy="off", buckets=(4, 8, 64), prompt_floor=2, max_chunk=32, controller=UNFILLED, in_flight=0
        )
        world = World(setting, TALKS_ON)
        world.add(request("decoding", serial(99), slo=Slo(tpot=tpot, ttft=9.0)))
        world.run_until(lambda: world.emitted("decoding") > 2)
        before = len(world.steps)
        world.add(request("reading", serial(1), prompt=64, slo=Slo(tpot=1.0, ttft=ttft)))
        world.run_until(lambda: world.emitted("reading") > 0)
        return len(world.steps) - before

    assert steps(ttft=9.0, tpot=1.0) <= 4, "nothing is urgent: whole chunks"
    assert steps(ttft=9.0, tpot=0.002) > 9, "no room for the bucket of 64 within the TPOT target"


def test_the_pace_of_a_prompt_follows_from_what_steps_may_take() -> None:
    """The budget leaves five steps until the prompt is due."""
    bench = Bench()
    controller = Controller(bench.latency, config=ControllerConfig(max_chunk=7))
    live = bench.live(serial(1), prompt=12)
    reading = [Turn(live, live.runnable())]
    draft = bench.draft()
    draft.budget = live.pace.reading_deadline / 5
    controller.read_prompts(draft, reading, at_pace=True)
    assert draft.rows == 3
    controller.read_prompts(draft, reading, at_pace=True)
    assert draft.rows == 3, "that much is read already"
    controller.read_prompts(draft, reading, at_pace=False)
    assert draft.rows == 7, "a chunk is one with what was read before it"


def test_a_chunk_is_bounded() -> None:
    world = serve([request("r", serial(2), prompt=50)], Setting(max_chunk=7, buckets=(64,)), TALKS_ON)
    assert [rows_by_request(step)["r"] for step in world.steps[:8]] == [7] * 7 + [1]
