from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bench.load.workload import (
    ARRIVALS,
    BURST_PERIOD,
    BURST_SECONDS,
    END,
    FAMILIES,
    Item,
    Workload,
    closed_loop,
    gamma,
    lognormal,
    main,
    named,
    open_loop,
    table,
)
from scheduler.program import ParallelStage, Plan, SerialStage, check_program
from scheduler.request import Slo

STATISTICS = {  # prompt tokens, share parallel, branches of a parallel stage, output tokens
    "fanout": (800, 0.8, 18.4, 0.8 * (80 + 18.4 * 200 + 120) + 0.2 * 400),
    "mixed": (500, 0.5, 6.25, 0.5 * (1.75 * (100 + 6.25 * 200) + 80) + 0.5 * 400),
    "light": (300, 1.0, 3.0, 600 + 3 * 100 + 400),
    "best-of-n": (500, 0.5, 28 / 3, 0.5 * 300 * (28 / 3) + 0.5 * 300),
}


def arrivals(kind: str, rate: float, seconds: float) -> np.ndarray:
    times = ARRIVALS[kind](np.random.default_rng(3), rate)
    return np.array([*itertools.takewhile(lambda now: now < seconds, times)])


def test_a_lognormal_has_the_mean_that_it_is_named_after() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([lognormal(rng, 200, 0.5) for _ in range(20_000)]) == pytest.approx(200, rel=0.02)
    assert max(lognormal(rng, 300, 0.5, 400) for _ in range(1000)) == 400


def test_statistics_are_means_and_what_is_offered_a_second() -> None:
    items = (Item(0.0, 10, ((4,), (3, 5))), Item(1.0, 30, ((8,),)))
    statistics = Workload("hand-made", "poisson", 0, items, rate=0.5, seconds=4.0).statistics()
    assert statistics == {
        "requests": 2,
        "prompt_tokens": 20,
        "output_tokens": 10,
        "critical_path": (4 + 5 + 8) / 2,
        "share_parallel": 0.5,
        "branches": 2,
        "output_tokens_s": 5.0,
    }


@pytest.mark.parametrize("family", STATISTICS)
def test_a_family_has_the_means_that_define_it(family: str) -> None:
    statistics = closed_loop(family, 1, 6000, seed=5).statistics()
    measured = [statistics[key] for key in ("prompt_tokens", "share_parallel", "branches", "output_tokens")]
    assert measured == pytest.approx(STATISTICS[family], rel=0.04)


def test_reasoning_alternates_and_stays_within_1500_tokens_a_stage() -> None:
    items = closed_loop("reasoning", 1, 2000, seed=1).items
    assert max(length for item in items for stage in item.stages for length in stage) <= 1500
    parallel = [item for item in items if item.parallel]
    assert len(parallel) / len(items) == pytest.approx(0.7, abs=0.03)
    for item in parallel:
        assert len(item.stages) in (5, 7, 9)
        assert all(len(stage) == 1 for stage in item.stages[::2])
        assert all(len(stage) > 1 for stage in item.stages[1::2])


def test_bursts_keep_the_mean_rate_and_come_first_in_each_period() -> None:
    times = arrivals("bursty", 4.0, 200 * BURST_PERIOD)
    assert len(times) / (200 * BURST_PERIOD) == pytest.approx(4.0, rel=0.02)
    in_burst = np.mean(times % BURST_PERIOD < BURST_SECONDS)
    assert in_burst == pytest.approx(1.6 / 3, abs=0.01)
    assert np.all(np.diff(times) >= 0)
    steady = arrivals("poisson", 4.0, 200 * BURST_PERIOD)
    assert np.mean(steady % BURST_PERIOD < BURST_SECONDS) == pytest.approx(1 / 3, abs=0.01)


def test_a_seed_decides_everything() -> None:
    first, again, other = (open_loop("mixed", "bursty", 2.0, 60.0, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.items != other.items


DIGESTS = {  # by name, seed and seconds: the first 16 hexadecimal digits
    ("headline", 1, 105.0): "e1fe39cbc7298526",
    ("headline", 2, 105.0): "f8cff117ed27f63a",
    ("headline", 3, 105.0): "b658aab43a4e82fa",
    ("headline-closed", 1, 105.0): "ed479498a04a53a5",
    ("headline-closed", 2, 105.0): "97a678f47d1276a7",
    ("headline-closed", 3, 105.0): "dcea628aaf52cc5e",
    ("mixed", 1, 60.0): "64a2842e0b74ff95",
    ("reasoning", 1, 60.0): "d71301d2b1d3aa47",
    ("light", 1, 60.0): "33e7bd2d8ffc57b2",
    ("best-of-n", 1, 60.0): "cf4c6a7145a6b3a5",
    ("azure-conv", 1, 60.0): "5fa4b62d03806dba",
}


@pytest.mark.parametrize("named_as", DIGESTS)
def test_workloads_do_not_drift(named_as: tuple[str, int, float]) -> None:
    """Results are compared across months: a name and a seed are the same requests, to the last bit."""
    assert named(*named_as).digest[:16] == DIGESTS[named_as]


def test_the_headline_points_are_what_the_issue_says() -> None:
    assert named("headline", 3, 90.0) == open_loop("fanout", "bursty", 1.6, 90.0, 3)
    assert named("headline", 3, 90.0, rate=0.8).rate == 0.8
    assert named("headline-closed", 3, 9.0) == closed_loop("fanout", 40, 90, 3)
    assert len(named("headline-closed", 3, 9.05).items) == 91, "they have to last"
    assert named("headline-closed", 3, 9.0, clients=20).clients == 20


def test_a_name_is_a_family_or_a_file(tmp_path: Path) -> None:
    assert named("mixed", 2, 30.0, arrivals="poisson") == open_loop("mixed", "poisson", 1.6, 30.0, 2)
    assert named("azure-conv", 2, 30.0, rate=5.53).arrivals == "azure-conv"
    workload = closed_loop("light", 2, 3, seed=1)
    workload.save(tmp_path / "w.json")
    assert named(str(tmp_path / "w.json"), 9, 30.0) == workload
    with pytest.raises(ValueError, match="arrivals of its own"):
        named(str(tmp_path / "w.json"), 9, 30.0, rate=1.0)
    with pytest.raises(FileNotFoundError):
        named("fan-out", 1, 30.0)


def test_azure_conv_has_the_published_medians_and_ratio() -> None:
    items = closed_loop("azure-conv", 1, 40_000, seed=1).items
    assert not any(item.parallel for item in items)
    assert np.median([item.prompt for item in items]) == pytest.approx(1020, rel=0.01)
    assert np.median([item.tokens for item in items]) == pytest.approx(129, rel=0.02)
    totals = sum(item.prompt for item in items) / sum(item.tokens for item in items)
    assert totals == pytest.approx(5.47, rel=0.02)


@pytest.mark.parametrize("burstiness", [0.5, 1 / 1.2, 3.0])
def test_gamma_gaps_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = [*itertools.islice(gamma(np.random.default_rng(1), 4.0, burstiness), 20_000)]
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert np.var(gaps) / np.mean(gaps) ** 2 == pytest.approx(1 / burstiness, rel=0.06)


def test_a_smaller_workload_has_the_same_shape() -> None:
    workload = open_loop("fanout", "bursty", 2.0, 60.0, seed=1)
    small = workload.scaled(0.1)
    for item, less in zip(workload.items, small.items, strict=True):
        assert (less.arrival, less.join) == (item.arrival, item.join)
        assert [*map(len, less.stages)] == [*map(len, item.stages)]
        assert less.prompt == max(1, round(0.1 * item.prompt))
    assert workload.scaled(1e-9).items[0].critical_path == len(workload.items[0].stages)
    assert workload.scaled(1.0) == workload


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_workload_back(family: str, tmp_path: Path) -> None:
    workload = closed_loop(family, 4, 20, seed=1)
    workload.save(tmp_path / "file.json")
    assert Workload.load(tmp_path / "file.json") == workload


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(ValueError, match="not a workload file"):
        Workload.load(tmp_path / "file.json")


def test_a_request_forces_its_lengths_by_limits_alone() -> None:
    item = Item(0.0, 50, ((9,), (3, 5), (7,)))
    request = item.request("a", Slo(), seed=1, vocab_size=10)
    assert len(request.prompt) == 50
    assert set(request.prompt) <= set(range(10))
    assert isinstance(request.program, Plan)
    check_program(request.program)
    head, fork, tail = request.program.stages
    assert isinstance(head, SerialStage)
    assert isinstance(fork, ParallelStage)
    assert isinstance(tail, SerialStage)
    assert (head.stopping.max_tokens, tail.stopping.max_tokens) == (9, 7)
    assert [branch.stopping.max_tokens for branch in fork.branches] == [3, 5]
    stoppings = [head.stopping, tail.stopping, *(branch.stopping for branch in fork.branches)]
    assert not any(stopping.eos_ids or stopping.stop_ids or stopping.stop_strings for stopping in stoppings)
    assert request == item.request("a", Slo(), seed=1, vocab_size=10)
    assert (item.tokens, item.critical_path, item.parallel) == (24, 21, True)


def test_a_limit_may_be_larger_than_the_length_and_then_a_token_ends_the_branch() -> None:
    program = Item(0.0, 50, ((9,), (3, 5))).request("a", Slo(), seed=1, limits=1.5).program
    assert isinstance(program, Plan)
    head, fork = program.stages
    assert isinstance(head, SerialStage)
    assert isinstance(fork, ParallelStage)
    stoppings = [head.stopping, *(branch.stopping for branch in fork.branches)]
    assert [stopping.max_tokens for stopping in stoppings] == [14, 5, 8]
    assert {stopping.eos_ids for stopping in stoppings} == {frozenset({END})}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_programs_that_can_run(family: str) -> None:
    for item in closed_loop(family, 1, 30, seed=2).items:
        check_program(item.request("a", Slo(), seed=0).program)


def test_the_table_says_what_is_not_known(tmp_path: Path) -> None:
    assert table(Workload("none", "poisson", 1, ())).splitlines()[2].split() == ["prompt", "tokens", "-"]
    out = tmp_path / "w.json"
    options = ["--family", "light", "--rate", "1", "--seconds", "20", "--seed", "4", "--json", str(out)]
    assert main(options) == Workload.load(out)


def test_only_what_follows_a_join_is_forced_to_say_so() -> None:
    program = Item(0.0, 5, ((3,), (4,), (2, 2), (6,))).request("a", Slo(tpot=1.0, ttft=1.0), seed=1).program
    assert isinstance(program, Plan)
    assert [len(stage.prefix) for stage in program.stages if isinstance(stage, SerialStage)] == [0, 0, 3]
