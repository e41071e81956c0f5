from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from bench.load.measures import Record, Window
from bench.load.workload import BRANCH_SEED, JOIN_SEED, Item, Workload, closed_loop, named, open_loop
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, Simulation, simulate, targets, unloaded_tpot
from scheduler.controller import ControllerConfig
from scheduler.predictor import StepLoad
from scheduler.request import Slo
from serve.door import StepRecord
from tests.bench.load.records import seen

PROFILE = Profile.load("h200-qwen3-32b").exact()
POLICIES = ("off", "cap:2", "eager", "taper")


def setting(**changes: Any) -> Setting:
    workload = Workload("hand-made", "poisson", 0, (Item(0.0, 100, ((40,),)),))
    return replace(Setting(profile=PROFILE, workload=workload, slo=Slo(tpot=0.031, ttft=5.0)), **changes)


# --- the row of a policy -----------------------------------------------------------------------------------


def test_what_arrived_in_the_window_is_measured() -> None:
    serial = Item(0.0, 1, ((20,),))
    simulation = Simulation(setting(window=Window(10.0, 20.0)), "off")
    simulation.records = [
        seen(serial, 10.5, *[0.01] * 19, arrival=9.0),  # before it
        seen(serial, 11.0, *[0.01] * 19, arrival=10.0),
        Record(serial, 13.0),  # not answered
        seen(serial, 20.5, *[0.01] * 19, arrival=19.9),  # answered after it
        seen(serial, 21.0, *[0.01] * 19, arrival=20.0),  # after it
    ]
    result = simulation.run().row()
    assert result["attainment_stage"] == 2 / 3
    assert result["goodput_stage"] == (20 + 20) / 10
    assert result["mean_width"] is None


# --- the clock ---------------------------------------------------------------------------------------------


def test_one_request_alone_takes_a_step_for_each_token() -> None:
    """1000 positions are read on average: the prompt and half of the answer."""
    alone = PROFILE.latency().predict(StepLoad(1, private_kv=1000, items=1, raw_kv=1000))
    assert unloaded_tpot(PROFILE) == pytest.approx(PROFILE.factors[8] * alone, rel=1e-3)
    slower = replace(PROFILE, factors={8: 2 * PROFILE.factors[8]})
    assert unloaded_tpot(slower) == pytest.approx(2 * unloaded_tpot(PROFILE))
    assert unloaded_tpot(replace(PROFILE, noise=(0.5, 0.5))) == unloaded_tpot(PROFILE)


def test_a_prompt_chunk_pays_for_its_context() -> None:
    simulation = Simulation(setting(), "off")
    simulation._send_next(0.0)
    scheduled = simulation.scheduler.schedule(0.0)
    assert scheduled is not None
    step, load = scheduled.step, scheduled.forecast.load
    assert (step.rows, len(step.entries), load.kv_tokens) == (100, 1, 100)
    later = sum(range(2, 101))  # what the rows after the first see
    assert load == StepLoad(100, private_kv=100, items=1, chunk_context=later, raw_kv=100)
    expected = PROFILE.factors[128] * PROFILE.latency().predict(load)
    assert simulation._duration(scheduled) == pytest.approx(expected)


def test_what_is_served_counts_when_it_comes_and_not_who_asked() -> None:
    def served(window: Window) -> Simulation:
        simulation = Simulation(setting(window=window), "off")
        simulation.serve()
        return simulation

    (whole,) = served(Window()).records
    middle = (whole.first + whole.last) / 2
    before, after = served(Window(end=middle)), served(Window(middle))
    assert (before.tokens + after.tokens, before.turns + after.turns) == (40, 40)
    assert 15 < before.tokens < 25
    assert before.run().row()["raw_tokens_s"] == before.tokens / middle
    assert (len(before.measured), len(after.measured)) == (1, 0)
    assert after.run().row()["good_tokens_s"] == after.run().row()["raw_tokens_s"] > 0
    late = Simulation(setting(slo=Slo(tpot=0.001, ttft=5.0)), "off")
    late.serve()
    assert (late.run().good_tokens, late.run().tokens) == (0, 40)


def test_a_step_counts_where_it_ends() -> None:
    whole = Simulation(setting(), "off")
    whole.serve()
    first = whole.records[0].first
    for end, tokens in ((first, 0), (first + 1e-9, 1)):
        simulation = Simulation(setting(window=Window(0.0, end)), "off")
        simulation.serve()
        assert (simulation.tokens, simulation.turns) == (tokens, tokens)


def test_it_ends_once_all_that_is_measured_is_answered() -> None:
    items = (Item(0.0, 100, ((40,),)), Item(0.02, 100, ((4000,),)))
    workload = Workload("hand-made", "poisson", 0, items)
    simulation = Simulation(setting(workload=workload, window=Window(0.0, 0.01)), "off")
    simulation.serve()
    assert [record.finished for record in simulation.records] == [True, False]


def test_a_client_that_forks_by_itself_gets_the_same_tokens_from_more_requests() -> None:
    """Whole pages of what was said before are found in the cache; what the branches said is read again."""
    item = Item(0.0, 640, ((64,), (40, 30, 50), (20,)))
    workload = Workload("hand-made", "poisson", 0, (item, replace(item, arrival=0.1)))
    given, sent = {}, {}
    for fork in ("server", "client"):
        simulation = Simulation(setting(workload=workload, fork=fork), "eager")
        simulation.serve()
        assert [record.finished for record in simulation.records] == [True, True]
        assert {record.tokens for record in simulation.records} == {item.tokens}
        assert {len(record.stage_ends) for record in simulation.records} == {3}
        given[fork], sent[fork] = simulation.given, simulation.sent
    assert given["server"] == 2 * (640 + 3 * BRANCH_SEED + JOIN_SEED), "joined by KV"
    joined, page = 40 + 30 + 50, PROFILE.page_size
    assert 2 * (640 + joined) < given["client"] < 2 * (640 + joined + 5 * page)
    assert sent == {"server": 2, "client": 2 * 5}


def test_a_join_that_reads_again_counts_all_of_the_joined_text() -> None:
    item = Item(0.0, 640, ((64,), (40, 30, 50), (20,)), join="reprefill")
    simulation = Simulation(setting(workload=Workload("hand-made", "poisson", 0, (item,))), "eager")
    simulation.serve()
    prefixes, joined = 3 * BRANCH_SEED, 40 + 30 + 50
    assert simulation.given == 640 + prefixes + (prefixes + joined) + JOIN_SEED


def test_requests_without_branches_are_served_alike_by_every_policy() -> None:
    workload = named("headline", 1, 3.0, rate=1.4)
    rows = []
    for policy in POLICIES:
        simulation = Simulation(setting(workload=workload, fork="client"), policy)
        simulation.serve()
        rows.append(simulation.run().row() | simulation.footprint() | {"policy": ""})
    assert rows == [rows[0]] * len(POLICIES)
    assert rows[0]["requests"] > 1


def test_what_measured_answers_take_and_what_kv_is_held_meanwhile() -> None:
    items = (Item(0.0, 100, ((40,),)), Item(0.5, 1000, ((4000,),)))
    workload = Workload("hand-made", "poisson", 0, items)
    simulation = Simulation(setting(workload=workload, window=Window(0.0, 0.4)), "off")
    simulation.serve()
    took, page, pool = simulation.footprint(), PROFILE.page_size, PROFILE.num_pages * PROFILE.page_size
    assert (took["requests"], took["given_tokens"]) == (1, 100)
    assert took["kv_most"] == 2 * page / pool, "at 0.4 s it has its prompt and some twenty tokens"
    assert took["kv_held"] == pytest.approx(took["kv_most"], rel=0.1)
    assert len(simulation.records) == 2, "of which one is not measured"


def test_what_is_not_answered_in_time_is_given_up() -> None:
    item = Item(0.0, 100, ((4000,),))
    workload = Workload("hand-made", "poisson", 0, (item,))
    simulation = Simulation(setting(workload=workload, window=Window(0.0, 1.0, drain=2.0)), "off")
    simulation.serve()
    assert 3.0 < simulation.now < 3.5
    assert simulation.run().row()["ttft_attainment"] == 0.0


def test_an_answer_ends_where_it_did_whatever_its_limits() -> None:
    """A limit ends a branch at its last token; END comes a step later, when the next is on its way."""
    items = Item(0.0, 100, ((7,), (5, 1, 9), (4,))), Item(0.0, 9, ((1,),))
    workload = Workload("hand-made", "poisson", 0, items)
    exact, loose = (Simulation(setting(workload=workload, limits=limits), "eager") for limits in (1.0, 3.0))
    for simulation in (exact, loose):
        simulation._send_next(0.0)
        limits = simulation.setting.limits
        (live,) = simulation.scheduler.live.values()
        assert live.request == items[0].request("0", simulation.setting.slo, 0, limits=limits)
        simulation.serve()
        assert [record.tokens for record in simulation.records] == [7 + 5 + 1 + 9 + 4, 1]
        assert [len(record.stage_ends) for record in simulation.records] == [3, 1]
        assert all(record.finished for record in simulation.records)
    assert loose.steps == exact.steps + 2 * 3
    assert loose.given == exact.given


def test_a_closed_loop_never_has_more_requests_than_clients() -> None:
    simulation = Simulation(setting(workload=closed_loop("light", 3, 7, seed=1)), "eager")
    simulation.serve()
    assert len(simulation.measured) == 7
    events = [(r.arrival, 1) for r in simulation.measured] + [(r.last, -1) for r in simulation.measured]
    open_requests = 0
    for _, change in sorted(events):
        open_requests += change
        assert open_requests <= 3


def test_the_scheduler_has_the_pool_and_the_controller_of_the_setting() -> None:
    config = ControllerConfig(rho=0.5, max_chunk=64)
    workload = open_loop("light", "poisson", 3.0, 4.0, seed=1)
    simulation = Simulation(setting(controller=config, reserve=0.25, workload=workload), "cap:2")
    scheduling = simulation.scheduler.config
    assert (scheduling.num_pages, scheduling.page_size) == (PROFILE.num_pages, PROFILE.page_size)
    assert (scheduling.reserve, scheduling.prefix_cache) == (0.25, False)
    assert scheduling.max_queue > len(workload.items)
    assert simulation.scheduler.controller.config == config


@pytest.mark.parametrize(("believed", "bias"), [(0.5, 0.5), (2.0, -1.0)])
def test_the_bias_is_what_steps_take_longer_than_was_believed(believed: float, bias: float) -> None:
    """As a share of what they take: negative where they are quicker."""
    fixed = replace(PROFILE, factors={})
    believes = replace(
        fixed,
        forms={
            "staircase": {
                "buckets": {rows: believed * seconds for rows, seconds in fixed.bucket_seconds.items()},
                "costs": {name: believed * cost for name, cost in asdict(fixed.costs).items()},
                "margin": 0.0,
            }
        },
    )
    simulation = Simulation(setting(profile=fixed), "off", latency=believes.latency())
    scheduled = simulation.scheduler.schedule(0.0)
    assert scheduled is None
    simulation._send_next(0.0)
    scheduled = simulation.scheduler.schedule(0.0)
    assert scheduled is not None
    simulation._finish(scheduled, 3.0, 3.0 + simulation._duration(scheduled))
    assert simulation.error_sums == pytest.approx([bias, abs(bias)], rel=1e-3)
    assert simulation.steps == 1


# --- the lateness of a server ------------------------------------------------------------------------------


def logged(ratio: float, predicted: float = 0.020) -> StepRecord:
    return StepRecord(1.0, 8, StepLoad(3), 2, 3, 0, predicted, 0.015, None, ratio * predicted)


LATE = PROFILE.replaying(logged(ratio) for ratio in (1.0, 1.5, 0.75, 1.0, 2.0, 0.5, 1.25))


def durations(simulation: Simulation, count: int) -> list[float]:
    """Of the same step, again and again."""
    simulation._send_next(0.0)
    scheduled = simulation.scheduler.schedule(0.0)
    assert scheduled is not None
    return [simulation._duration(scheduled) for _ in range(count)]


def test_steps_are_late_as_those_of_the_log_were_and_in_their_order() -> None:
    (exact,) = durations(Simulation(setting(), "off"), 1)
    ratios = [took / exact for took in durations(Simulation(setting(profile=LATE), "off"), 21)]
    assert ratios[:7] == ratios[7:14] == ratios[14:]
    first = ratios.index(pytest.approx(1.5))
    assert ratios[first : first + 7] == pytest.approx([1.5, 0.75, 1.0, 2.0, 0.5, 1.25, 1.0])
    starts = {durations(Simulation(setting(profile=LATE, seed=seed), "off"), 1)[0] for seed in range(20)}
    assert len(starts) > 3, "another seed begins at another step"


def test_a_logs_lateness_takes_the_place_of_the_noise_and_is_no_part_of_the_targets() -> None:
    noisy = replace(PROFILE, noise=(0.3, 0.3))
    punctual = noisy.replaying([logged(1.0)])
    assert durations(Simulation(setting(profile=punctual), "off"), 2) == durations(
        Simulation(setting(), "off"), 2
    )
    assert targets(LATE) == targets(PROFILE)
    assert LATE.exact() == PROFILE


def test_a_log_without_a_prediction_is_no_log_of_lateness() -> None:
    assert PROFILE.replaying([logged(1.0, predicted=0.0), logged(1.5)]).excess == pytest.approx((0.5,))
    with pytest.raises(ValueError, match="no step of the log was predicted"):
        PROFILE.replaying([logged(1.0, predicted=0.0)])


def test_what_a_late_host_costs_a_policy_shows() -> None:
    """Every third step takes twice as long, and nothing makes up for it."""
    late = PROFILE.replaying(logged(ratio) for ratio in (1.0, 1.0, 2.0))
    workload = open_loop("fanout", "bursty", 1.0, 2.0, seed=2)
    rows = [
        simulate(setting(profile=profile, workload=workload, slo=targets(PROFILE)), "eager")[0]
        for profile in (PROFILE, late)
    ]
    assert rows[0]["e2e_p50_s"] * 1.2 < rows[1]["e2e_p50_s"]


# --- a short headline --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Simulation]:
    workload = open_loop("fanout", "bursty", 1.0, 4.0, seed=2)
    shared = setting(workload=workload, slo=targets(PROFILE))
    simulations = {policy: Simulation(shared, policy) for policy in POLICIES}
    for simulation in simulations.values():
        simulation.serve()
    return simulations


def test_every_policy_answers_everything_in_full(runs: dict[str, Simulation]) -> None:
    for simulation in runs.values():
        items = simulation.setting.workload.items
        assert len(simulation.measured) == len(items) > 5
        assert [record.arrival for record in simulation.measured] == [item.arrival for item in items]
        for record in simulation.measured:
            assert record.finished
            assert record.tokens == record.item.tokens
            assert len(record.stage_ends) == len(record.item.stages)
            assert record.arrival < record.first < record.last
        assert simulation.scheduler.idle
        assert simulation.scheduler.pool.owned == 0


def test_policies_differ_as_their_names_say(runs: dict[str, Simulation]) -> None:
    rows = {policy: simulation.run().row() for policy, simulation in runs.items()}
    assert rows["off"]["mean_width"] == 1.0
    assert 1.0 < rows["cap:2"]["mean_width"] <= 2.0
    assert rows["cap:2"]["mean_width"] < rows["taper"]["mean_width"] <= rows["eager"]["mean_width"] + 0.1
    assert rows["eager"]["e2e_p50_s"] < rows["cap:2"]["e2e_p50_s"] < rows["off"]["e2e_p50_s"]
    assert rows["taper"]["goodput_stage"] > 1.77 * rows["off"]["goodput_stage"]


@pytest.mark.full
def test_the_headlines_ratios() -> None:
    """The point that was measured on an H200 (docs/results.md), with the noise of such a server."""
    profile = Profile.load("h200-qwen3-32b")
    workload = named("headline", seed=1, seconds=65.0, rate=1.4)
    window = Window(30.0, 60.0, drain=150.0)
    point = setting(profile=profile, workload=workload, slo=targets(profile), window=window, seed=1)
    taper, eager, off = (simulate(point, policy)[0] for policy in ("taper", "eager", "off"))
    assert taper["goodput_stage"] >= 1.48 * eager["goodput_stage"]
    assert taper["goodput_stage"] >= 1.77 * off["goodput_stage"]
    assert taper["goodput_mean"] >= 1.77 * off["goodput_mean"]
    assert min(taper["serial_attainment"], taper["parallel_attainment"]) >= 0.99
    assert eager["attainment_stage"] < 0.8


def test_a_simulation_is_deterministic_also_with_noise() -> None:
    noisy = replace(PROFILE, noise=(-0.1, 0.0, 0.1))
    workload = open_loop("mixed", "poisson", 2.0, 4.0, seed=1)
    (first, cost), (again, _) = (simulate(setting(profile=noisy, workload=workload), "taper") for _ in "12")
    assert first == again
    assert first != simulate(setting(profile=noisy, workload=workload, seed=1), "taper")[0]
    assert 0.03 < cost["mape"] < 0.09
