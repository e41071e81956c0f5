from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bench.workload import (
    ARRIVALS,
    BURST_PERIOD,
    BURST_SECONDS,
    FAMILIES,
    Item,
    Workload,
    closed_loop,
    lognormal,
    main,
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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_programs_that_can_run(family: str) -> None:
    for item in closed_loop(family, 1, 30, seed=2).items:
        check_program(item.request("a", Slo(), seed=0).program)


def test_the_table_says_what_is_not_known(tmp_path: Path) -> None:
    assert table(Workload("none", "poisson", 1, ())).splitlines()[2].split() == ["prompt", "tokens", "-"]
    out = tmp_path / "w.json"
    options = ["--family", "light", "--rate", "1", "--seconds", "20", "--seed", "4", "--json", str(out)]
    assert main(options) == Workload.load(out)
