"""The controller's rules: who advances in a step, what it may cost, when prompts are read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given

from scheduler.controller import Controller, ControllerConfig, Turn
from scheduler.policy import Extra
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.program import BranchSpec, ParallelStage
from scheduler.request import Request, Slo
from scheduler.step import Entry, Forecast, Step
from tests.scheduler.alphabet import LETTERS, PLAIN
from tests.scheduler.drafts import Bench
from tests.scheduler.requests import fork, request, serial, stopping
from tests.scheduler.strategies import examples, loads, plans, serving
from tests.scheduler.symbolic import SymbolicModel, unique_kv_tokens, widths
from tests.scheduler.world import Setting, World, roomy, serve

TALKS_ON = SymbolicModel(LETTERS)
MODEL = SymbolicModel(PLAIN)
UNFILLED = ControllerConfig(rho=0.8, repay=0.0, fill=False)
FLOOR_ONLY = ControllerConfig(rho=0.0, fill=False)
NEVER = Slo(tpot=math.inf, ttft=math.inf)


def rows_by_request(step: Step) -> dict[str, int]:
    rows: dict[str, int] = defaultdict(int)
    for entry in step.entries:
        rows[entry.request_id] += entry.rows
    return rows


# --- who may start -------------------------------------------------------------------------------------


def test_a_running_request_is_priced_before_its_prompt_is_read() -> None:
    """c would be the fourth row of a bucket of three, though only a decodes so far."""
    world = World(Setting(buckets=(3, 32), prompt_floor=1, max_chunk=1, in_flight=0), TALKS_ON)
    slo = Slo(tpot=0.0023, ttft=9.0)
    for name in "ab":
        world.add(request(name, serial(30), prompt=1 if name == "a" else 30, slo=slo))
    world.run_until(lambda: world.emitted("a") > 1)
    assert world.running == ["a", "b"]
    world.add(request("c", serial(30), prompt=30, slo=slo))
    world.step()
    assert world.running == ["a", "b"]
    world.run([])


def test_a_request_starts_only_if_the_step_with_it_keeps_every_tpot_target() -> None:
    buckets = (2, 8)  # 1.2 ms and 1.8 ms
    world = World(Setting(buckets=buckets, prompt_floor=4), TALKS_ON)
    world.add(request("a", serial(9), slo=Slo(tpot=0.0017, ttft=9.0)))
    world.add(request("b", serial(9), slo=Slo(tpot=9.0, ttft=9.0)))
    world.run_until(lambda: world.emitted("a") > 4)
    assert world.running == ["a"]
    world.run([])
    assert world.emitted("b") == 9


def test_a_target_that_nobody_could_keep_lets_the_others_in() -> None:
    """Not even a step of one row takes as little: to wait would not help whoever asks for that."""
    world = World(Setting(buckets=(4, 8), prompt_floor=2), TALKS_ON)  # a row takes 1.4 ms
    world.add(request("greedy", serial(40), slo=Slo(tpot=1e-6, ttft=9.0)))
    for name in "ab":
        world.add(request(name, serial(9), slo=Slo(tpot=0.0025, ttft=9.0)))
    world.run_until(lambda: world.emitted("a") > 1 and world.emitted("b") > 1)
    assert world.emitted("greedy") < 40, "they do not wait for its end"
    assert world.running == ["greedy", "a", "b"]
    world.run([])


def test_a_server_that_can_keep_nobodys_target_does_not_serve_one_after_the_other() -> None:
    world = World(Setting(buckets=(4, 8), prompt_floor=2), TALKS_ON)
    for name in "abc":
        world.add(request(name, serial(20), slo=Slo(tpot=0.0013, ttft=9.0)))
    world.run_until(lambda: all(world.emitted(name) > 1 for name in "abc"))
    assert world.running == ["a", "b", "c"]
    world.run([])


def test_a_server_whose_steps_lie_near_the_target_serves_side_by_side_what_costs_nothing() -> None:
    """Eight rows take 1.8 ms, as one does, and the next bucket 7.4: it would hold the whole floor."""
    slo = Slo(tpot=0.0025, ttft=9.0)
    world = World(Setting(buckets=(8, 64), prompt_floor=32, policy="off"), TALKS_ON)
    for name in "abcdefg":
        world.add(request(name, serial(30), slo=slo))
    world.run_until(lambda: world.running == [*"abcdefg"])
    world.run([])
    assert world.steps[0].bucket == 64, "nobody decodes yet: the first prompt is read at once"
    assert all(step.bucket == 8 for step in world.steps[1:])


def test_a_margin_that_not_even_one_row_keeps_does_not_serve_one_after_the_other() -> None:
    """A twentieth under the target is less than the 1.8 ms of a row."""
    world = World(Setting(buckets=(8, 64), prompt_floor=32, policy="off"), TALKS_ON)
    for name in "ab":
        world.add(request(name, serial(5), slo=Slo(tpot=0.00189, ttft=9.0)))
    world.run_until(lambda: world.running == ["a", "b"])
    world.run([])


def test_a_target_that_the_request_could_not_keep_even_alone_over_its_prompt_holds_up_nobody() -> None:
    """A row takes 1.4 ms, and to read a prompt of 150 tokens 0.3 ms."""
    world = World(Setting(buckets=(4, 8), prompt_floor=2), TALKS_ON)
    world.add(request("long", serial(40), prompt=150, slo=Slo(tpot=0.0016, ttft=9.0)))
    for name in "abcd":
        world.add(request(name, serial(9), slo=Slo(tpot=0.1, ttft=9.0)))
    world.run_until(lambda: world.emitted("d") > 1)
    assert world.emitted("long") < 40
    world.run([])


@pytest.mark.parametrize(("binding", "width"), [(True, 1), (False, 4)])
def test_a_target_that_does_not_bind_holds_up_no_start_and_no_branch(binding: bool, width: int) -> None:
    world = World(Setting(buckets=(2, 8), prompt_floor=2, in_flight=0), TALKS_ON)
    world.add(request("tight", serial(60), slo=Slo(tpot=0.0013, ttft=9.0, binding=binding)))
    world.run_until(lambda: world.emitted("tight") == 1)
    world.add(request("forks", fork(4, tokens=5)))
    if binding:
        world.run([])
        assert all(len(rows_by_request(step)) == 1 for step in world.steps)
    else:
        world.run_until(lambda: world.scheduler.idle)
        assert max(widths(step).get("forks", 0) for step in world.steps) == width


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


def test_a_target_that_nobody_could_keep_does_not_keep_padding_empty() -> None:
    """It is no measure of how much longer filling the bucket may make a step; nothing is, if all are so."""
    greedy, patient = Slo(tpot=1e-6, ttft=9.0), Slo(tpot=1.0, ttft=9.0)
    setting = Setting(buckets=(4, 32), prompt_floor=2, in_flight=0, controller=ControllerConfig(rho=0.0))
    for slo, rows in ((patient, 4), (greedy, 2)):
        load = [request("greedy", fork(3, tokens=20), slo=greedy), request("other", serial(30), slo=slo)]
        world = serve(load, setting, TALKS_ON)
        both = [sum(by.values()) for by in map(rows_by_request, world.steps) if len(by) == 2]
        assert max(both[4:]) == rows


@pytest.mark.parametrize("decoding", [False, True])
def test_a_start_weighs_what_decoding_forces_the_floor_and_every_prompt_that_is_not_read(
    decoding: bool,
) -> None:
    """The bucket of 8 takes 1.8 ms, a KV position 2 us; a start leaves a twentieth of the target."""
    world = World(Setting(buckets=(8, 32), prompt_floor=4, in_flight=0), TALKS_ON)
    positions = 4 + 50  # the floor's, and the new prompt's
    if decoding:
        world.add(request("decoding", serial(40), prompt=9))
        world.run_until(lambda: world.emitted("decoding") == 3)
        world.add(request("reading", serial(40), prompt=70))
        world.step()
        positions += 9 + 3 + 70

    def may_start(tpot: float) -> bool:
        name = f"tpot {tpot}"
        world.add(request(name, serial(40), prompt=50, slo=Slo(tpot=tpot, ttft=9.0)))
        return world.scheduler.controller.may_start(world.scheduler.live[name], world.scheduler.running)

    least = (1.8e-3 + 2e-6 * positions) / 0.95
    assert may_start(1.0001 * least)
    assert not may_start(0.9999 * least)


def test_the_floor_is_at_most_half_of_the_largest_bucket() -> None:
    def floor(prompt_floor: int, largest: int) -> int:
        config = ControllerConfig(prompt_floor=prompt_floor)
        return Controller(StepLatencyModel({largest: 0.01}), "off", config).floor

    assert [floor(32, 64), floor(32, 8), floor(32, 1), floor(0, 8)] == [32, 4, 1, 1]


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


# --- what a step holds ---------------------------------------------------------------------------------


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


def test_padding_is_filled_even_without_slack() -> None:
    slo = Slo(tpot=0.00141, ttft=1.0)  # the bucket of 4 takes 1.4 ms, and the prompt 8 us
    setting = Setting(policy="taper", buckets=(4, 32), in_flight=0, prompt_floor=2)
    filled = serve([request("r", fork(6, tokens=20), slo=slo)], setting, TALKS_ON)
    narrow = serve(
        [request("r", fork(6, tokens=20), slo=slo)], replace(setting, controller=UNFILLED), TALKS_ON
    )
    assert max(widths(step)["r"] for step in filled.steps) == 4
    assert max(widths(step)["r"] for step in narrow.steps) == 1


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


def test_padding_is_filled_with_the_cheapest_branches() -> None:
    controller = Controller(Bench().latency)
    draft = Bench().draft()
    extras = [Extra(number, 0, 1, seconds) for number, seconds in enumerate((5.0, 1.0, 4.0, 2.0, 3.0))]
    draft.baseline = 100.0
    assert controller.filled(draft, extras) == 110.0, "the bucket of the baseline has room for four"
    assert controller.filled(draft, [Extra(0, 0, 3, 1.0), Extra(1, 0, 2, 2.0), Extra(2, 0, 1, 3.0)]) == 101.0


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


# --- what a step may cost ------------------------------------------------------------------------------


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


# --- prompts -------------------------------------------------------------------------------------------


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
    setting = Setting(
        policy="off", buckets=(8,), prompt_floor=2, max_chunk=2, controller=FLOOR_ONLY, in_flight=0
    )
    world = World(setting, TALKS_ON)
    world.add(request("decoding", serial(99), slo=Slo(tpot=0.0030, ttft=9.0)))
    world.run_until(lambda: world.emitted("decoding") > 3)
    world.add(request("relaxed", serial(1), prompt=30, slo=Slo(tpot=1.0, ttft=20.0)))
    world.add(request("urgent", serial(1), prompt=30, slo=Slo(tpot=1.0, ttft=10.0)))
    world.run_until(lambda: world.emitted("urgent") + world.emitted("relaxed") > 0, most=40)
    assert (world.emitted("urgent"), world.emitted("relaxed")) == (1, 0)
    assert world.running == ["decoding", "relaxed"]


def test_a_prompt_that_missed_its_target_is_not_starved_by_those_that_have_not() -> None:
    setting = Setting(
        policy="off", buckets=(8,), prompt_floor=2, max_chunk=2, controller=FLOOR_ONLY, in_flight=0
    )
    world = World(setting, TALKS_ON)
    world.add(request("decoding", serial(150), slo=Slo(tpot=0.0030, ttft=9.0)))
    world.add(request("late", serial(1), prompt=20, slo=Slo(tpot=1.0, ttft=0.0001)))
    for number in range(5):
        world.add(request(f"live{number}", serial(1), prompt=60, slo=Slo(tpot=1.0, ttft=90.0)))
    world.run_until(lambda: world.emitted("late") > 0, most=100)
    assert world.emitted("live4") == 0


def test_the_floor_goes_to_a_prompt_that_can_be_in_time_but_for_one_step_in_eight() -> None:
    setting = Setting(
        policy="off", buckets=(8,), prompt_floor=2, max_chunk=2, controller=FLOOR_ONLY, in_flight=0
    )
    world = World(setting, TALKS_ON)
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
