"""Maps: one thing changes, and the cases say which."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.load.measures import Window
from bench.load.workload import named
from bench.simulate import maps
from bench.simulate.lateness import Lateness, identity
from bench.simulate.maps import (
    BY_CLIENT,
    LOADS,
    MAPS,
    MARGINS,
    READ_AGAIN,
    RESERVES,
    SOME,
    Case,
    biased,
    capacity,
    cases,
    run,
    with_fanout,
    with_share,
)
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, Simulation
from scheduler.config import RESERVE
from scheduler.controller import Controller
from scheduler.predictor import StepLoad
from tests.bench.simulate.in_one_process import InOneProcess

PROFILE = Profile.load("h200-qwen3-32b")
LOAD = StepLoad(100, shared_kv=20_000, private_kv=10_000, items=110, raw_kv=90_000)


def test_every_map_has_cases_for_every_seed() -> None:
    made = [*cases(MAPS, [1, 2])]
    assert {case.map for case in made} == {*MAPS}
    assert len(made) == len({*made})
    assert all({case.seed for case in made if case.map == name} == {1, 2} for name in MAPS)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_requests_that_branch(share: float) -> None:
    workload = named("headline", 1, 120.0, rate=2.0)
    changed = with_share(workload, share)
    assert [item.arrival for item in changed.items] == [item.arrival for item in workload.items]
    parallel = sum(item.parallel for item in changed.items) / len(changed.items)
    assert parallel == pytest.approx(share, abs=0.1)


def test_wider_fanouts_offer_the_same_tokens() -> None:
    for branches in (4, 32):
        workload = with_fanout(1, branches, 400.0)
        assert {len(item.stages[1]) for item in workload.items if item.parallel} == {branches}
        assert sum(item.tokens for item in workload.items) / 400.0 == pytest.approx(maps.OFFERED, rel=0.2)


def test_a_biased_predictor_stays_off_by_its_bias() -> None:
    exact, low = biased(PROFILE, 0.0), biased(PROFILE, -0.2)
    for _ in range(100):
        low.observe(LOAD, 2 * exact.predict(LOAD))
    assert low.predict(LOAD) == pytest.approx(0.8 * exact.predict(LOAD))
    assert low.row_line(500) == pytest.approx(tuple(0.8 * part for part in exact.row_line(500)))
    hot = {rows: PROFILE.factors[rows] * seconds for rows, seconds in PROFILE.bucket_seconds.items()}
    assert exact.rows_seconds(100) == pytest.approx(max(hot[rows] for rows in hot if rows <= 128))


def test_capacity_is_the_last_load_before_the_first_that_is_too_much() -> None:
    def at(label: str, x: float, *attained: float) -> list[dict[str, Any]]:
        return [{"map": "load", "label": label, "x": x, "attainment_stage": value} for value in attained]

    rows = [*at("taper", 1.0, 1.0, 0.995), *at("taper", 1.2, 0.97, 1.0), *at("taper", 1.4, 1.0)]
    rows += at("off", 1.0, 0.5)
    assert capacity(rows, "load") == {"taper": 1.0, "off": None}


def last(window: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a simulation last for a window of so many seconds, and nothing around it."""
    for name, seconds in (("WARMUP", 0.0), ("WINDOW", window), ("COOLDOWN", 0.0)):
        monkeypatch.setattr(maps, name, seconds)


@pytest.mark.full
def test_a_map_is_simulated_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last(1.0, monkeypatch)
    monkeypatch.setattr(maps, "in_processes", InOneProcess)
    out = tmp_path / "maps.json"
    found = maps.main(["--maps", "margin", "--seeds", "1", "--json", str(out)])
    assert json.loads(out.read_text()) == found
    assert {row["label"] for row in found["rows"]} == {*MARGINS}
    assert "quantile" in capsys.readouterr().out
    again = run(PROFILE, Case("margin", 0.8, "forgetting", 1))
    assert again in found["rows"]


def test_a_case_is_simulated_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    last(1.0, monkeypatch)
    row = run(PROFILE, Case("margin", 0.8, "forgetting", 1))
    assert (row["map"], row["label"], row["seed"]) == ("margin", "forgetting", 1)
    assert row["ttft_attainment"] == 1.0


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Setting, str]]:
    """The settings and the policies that `run` simulates, of windows of a second."""
    made: list[tuple[Setting, str]] = []

    def begin(setting: Setting, policy: str, **options: Any) -> Simulation:
        made.append((setting, policy))
        return Simulation(setting, policy, **options)

    last(1.0, monkeypatch)
    monkeypatch.setattr(maps, "Simulation", begin)
    return made


def test_every_policy_serves_loads_with_the_share_of_kv_that_is_reserved(begun) -> None:
    rows = [run(PROFILE, case) for case in cases(["reserve"], [1]) if case.x == 0.25]
    assert [row["policy"] for row in rows] == [f"{policy}, {load}" for load in LOADS for policy in SOME]
    assert [policy for _, policy in begun] == [*SOME] * len(LOADS)
    assert {setting.reserve for setting, _ in begun} == {0.25}
    seconds = begun[0][0].window.end + maps.COOLDOWN
    requests = [named("headline", 1, seconds, **load).digest for load in LOADS.values()]
    assert [setting.workload.digest for setting, _ in begun] == [each for each in requests for _ in SOME]


def test_maps_that_say_nothing_of_it_reserve_what_they_are_told(begun) -> None:
    for reserve in (1.0, 0.1):
        run(PROFILE, Case("load", 1.4, "taper", 1), reserve=reserve)
    run(PROFILE, Case("reserve", 0.25, "taper, 1.4/s", 1), reserve=0.1)
    assert [setting.reserve for setting, _ in begun] == [1.0, 0.1, 0.25]
    assert {setting.limits for setting, _ in begun} == {1.0}


def test_the_command_reserves_what_it_is_told_and_simulates_no_other_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(profile: Profile, case: Case, *, reserve: float) -> dict[str, Any]:
        figures = {"goodput_stage": reserve, "attainment_stage": float(case.x) < 1.7}
        return {**case._asdict(), **figures, "policy": case.label}

    monkeypatch.setattr(maps, "run", told)
    monkeypatch.setattr(maps, "in_processes", InOneProcess)
    for options, reserve in (([], RESERVE), (["--reserve", "0.5"], 0.5)):
        found = maps.main(["--maps", "sustained", "limits", "--seeds", "1", *options])
        assert {row["goodput_stage"] for row in found["rows"]} == {reserve} == {found["reserve"]}
    assert found["capacity"] == {"sustained": dict.fromkeys(maps.MOST, 1.6)}
    few = maps.main(["--maps", "limits", "--at", "2", "--seeds", "1"])["rows"]
    assert [(row["map"], row["x"]) for row in few] == [("limits", 2.0)] * len(RESERVES)


def test_steps_are_as_late_as_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Profile] = []

    def simulated(profile: Profile, case: Case, **_: float) -> dict[str, Any]:
        told.append(profile)
        return {**case._asdict(), "goodput_stage": 1.0, "attainment_stage": 1.0}

    monkeypatch.setattr(maps, "run", simulated)
    monkeypatch.setattr(maps, "in_processes", InOneProcess)
    late = Lateness(profile=identity(PROFILE), factors={8: 1.5}, steps=2, excess=[0.25, 0.0])
    run_of_headline = tmp_path / "headline-1.4-seed1-taper.json"
    run_of_headline.write_text(json.dumps({"rows": [{"lateness": asdict(late)}]}))
    options = ["--maps", "kept", "--at", "1", "--seeds", "1"]
    assert maps.main(options)["late_as"] is None
    found = maps.main([*options, "--late-as", str(run_of_headline)])
    assert found["late_as"] == run_of_headline.name
    assert found["tpot_unloaded_ms"] == pytest.approx(1.5e3 * PROFILE.bucket_seconds[8], rel=0.1)
    usual, as_late = told[0], told[-1]
    assert (usual.factors, usual.excess) == (PROFILE.factors, ())
    assert (as_late.factors, as_late.excess) == ({8: 1.5}, (0.25, 0.25, 0.0, 0.0))
    run_of_headline.write_text(json.dumps({"rows": [{}]}))
    with pytest.raises(ValueError, match="does not say how late its steps were"):
        maps.main([*options, "--late-as", str(run_of_headline)])


def test_limits_are_larger_than_answers_with_each_share_that_is_reserved(begun) -> None:
    rows = [run(PROFILE, case) for case in cases(["limits"], [1]) if case.x == 4.0]
    assert [row["label"] for row in rows] == [*RESERVES]
    assert [(setting.limits, setting.reserve, policy) for setting, policy in begun] == [
        (4.0, reserve, "taper") for reserve in (1.0, 0.5, 0.25, 0.1, 0.0)
    ]
    requests = named("headline", 1, begun[0][0].window.end + maps.COOLDOWN, rate=maps.RATE)
    assert {setting.workload.digest for setting, _ in begun} == {requests.digest}


def test_sustained_load_lasts_for_five_minutes(begun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (maps.SUSTAINED.warmup, maps.SUSTAINED.seconds) == (60.0, 300.0)
    monkeypatch.setattr(maps, "SUSTAINED", Window(1.0, 3.0))
    run(PROFILE, Case("sustained", 1.8, "cap:4", 1), reserve=0.1)
    run(PROFILE, Case("kept", 0.25, "off", 1), reserve=0.1)
    run(PROFILE, Case("load", 1.8, "eager", 1), reserve=0.1)
    assert [(setting.window.end, setting.reserve, policy) for setting, policy in begun] == [
        (3.0, 0.1, "cap:4"),
        (3.0, 0.25, "off"),
        (1.0, 0.1, "eager"),
    ]
    requests = [named("headline", 1, 3.0, rate=rate).digest for rate in (1.8, maps.RATE)]
    assert [setting.workload.digest for setting, _ in begun[:2]] == requests


def test_requests_start_up_to_a_share_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    last(1.0, monkeypatch)
    shares: list[float] = []

    def begin(setting: Setting, policy: str, *, controller: type[Controller], **options: Any) -> Simulation:
        shares.append(controller.START_MARGIN)
        return Simulation(setting, policy, controller=controller, **options)

    monkeypatch.setattr(maps, "Simulation", begin)
    monkeypatch.setattr(maps, "STARTS", {"1.8/s": (1.8, Window(1.0, 4.0))})
    rows = [run(PROFILE, Case("starts", x, "1.8/s", 1)) for x in (0.95, 0.75)]
    run(PROFILE, Case("load", 1.4, "taper", 1))
    assert shares == [0.95, 0.75, Controller.START_MARGIN]
    assert [(row["policy"], row["attainment_stage"]) for row in rows] == [("1.8/s", 1.0)] * 2


def test_load_lasts_for_as_long_as_a_point_says() -> None:
    windows = {case.x: maps.window_of(case) for case in cases(["lasting"], [1])}
    assert windows == {x: Window(30.0, 30.0 + x) for x in (30.0, 60.0, 120.0)}


def test_an_answer_is_one_request_or_many_by_who_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    last(3.0, monkeypatch)
    labels = "taper", READ_AGAIN, BY_CLIENT
    by_kv, again, client = (run(PROFILE, Case("fork", 1.4, label, 1)) for label in labels)
    assert by_kv["requests"] == again["requests"] == 1 < client["requests"]
    assert by_kv["given_tokens"] < again["given_tokens"] < client["given_tokens"]
    assert by_kv["raw_tokens_s"] > 0
    assert [row["policy"] for row in (by_kv, again, client)] == [*labels]
