"""A real result is simulated with its own requests, times and targets, and compared."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.load.measures import Window
from bench.load.workload import named
from bench.simulate import agreement
from bench.simulate.agreement import compare, files, settings, text, verdict
from bench.simulate.lateness import Lateness, identity
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, simulate, targets
from tests.bench.simulate.in_one_process import InOneProcess

PROFILE = Profile.load("h200-qwen3-32b").exact()


def row(goodput: float, attained: float) -> dict[str, Any]:
    names = ("goodput_mean", "raw_tokens_s", "mean_width", "e2e_p50_s")
    return dict.fromkeys(names, 1.0) | {"goodput_stage": goodput, "attainment_stage": attained}


@pytest.mark.parametrize(
    ("real", "simulated", "agrees"),
    [
        ((1000, 1.00), (960, 0.96), True),  # goodput counts, within 5 %
        ((1000, 1.00), (940, 1.00), False),
        ((1000, 0.60), (700, 0.64), True),  # attainment counts, within 5 points
        ((1000, 0.60), (1000, 0.66), False),
        ((1000, 0.96), (700, 0.96), False),  # goodput above 95 % and below 5 %, attainment in between
        ((1000, 0.94), (700, 0.94), True),
        ((1000, 0.95), (700, 0.95), True),
        ((1000, 0.05), (700, 0.05), True),
        ((1000, 0.06), (700, 0.06), True),
        ((1000, 0.04), (700, 0.04), False),
        ((0, 0.0), (0, 0.0), True),
        ((0, 0.0), (10, 0.01), False),
    ],
)
def test_what_counts_depends_on_the_attainment(
    real: tuple[float, float], simulated: tuple[float, float], agrees: bool
) -> None:
    assert compare(row(*real), [row(*simulated)])["agrees"] is agrees


def test_what_is_compared_is_the_mean_of_the_simulations_over_the_server() -> None:
    found = compare(row(1000, 0.9), [row(700, 0.86), row(900, 0.9)])
    assert found["goodput_off"] == pytest.approx(-0.2)
    assert found["attainment_off"] == pytest.approx(-0.02)
    assert found["simulated_attainment"] == [0.86, 0.9]
    assert found["goodput_stage"] == {"real": 1000, "simulated": 800}


def test_where_nothing_arrived_there_is_nothing_to_differ_in() -> None:
    nothing = row(0.0, 0.0) | {"attainment_stage": None, "e2e_p50_s": None}
    found = compare(nothing, [nothing, nothing])
    assert found["agrees"]
    assert found["e2e_p50_s"] == {"real": None, "simulated": None}
    assert found["simulated_attainment"] == [None, None]


def result(workload: str, policy: str, seconds: float) -> dict[str, Any]:
    """What bench.load.goodput would have written, had the server been the simulator."""
    times = {"warmup_s": 1.0, "window_s": seconds, "cooldown_s": 0.5, "drain_s": 60.0}
    requests = named(workload, 3, seconds + 1.5, rate=2.0)
    setting = Setting(
        profile=PROFILE,
        workload=requests,
        slo=targets(PROFILE),
        window=Window(1.0, 1.0 + seconds, drain=60.0),
        seed=3,
    )
    point = {"load": 2.0, "seed": 3}
    return {
        **times,
        "workload": workload,
        "scale": 1.0,
        "tpot_slo_ms": 1e3 * setting.slo.tpot,
        "ttft_slo_s": 5.0,
        "points": [point | {"closed": False, "sha256": requests.digest}],
        "rows": [point | simulate(setting, policy)[0] | {"policy": policy}],
    }


def test_the_simulator_agrees_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real.json").write_text(json.dumps(result("light", "taper", 4.0)))
    profile = {"name": "p", "num_pages": PROFILE.num_pages, "page_size": PROFILE.page_size}
    serving = {"serving": {"factors": PROFILE.factors}}
    (tmp_path / "p.json").write_text(json.dumps(profile | {"forms": PROFILE.forms} | serving))
    monkeypatch.setattr(agreement, "in_processes", InOneProcess)
    options = ["--profile", str(tmp_path / "p.json"), "--runs", "2"]
    found = agreement.main([str(tmp_path / "real.json"), *options])
    (only,) = found["rows"]
    assert only["agrees"]
    assert (only["run"], found["enough"]) == ("taper at light 2, seed 3", True)
    assert only["goodput_off"] == 0.0
    assert "agrees" in capsys.readouterr().out


def test_steps_are_as_late_as_those_of_the_run_were() -> None:
    real = result("light", "off", 2.0)
    late = Lateness(profile=identity(PROFILE), factors={8: 1.5}, steps=2, excess=[0.5, -0.25])
    real["rows"][0]["lateness"] = json.loads(json.dumps(asdict(late)))
    ((setting, _),) = settings(real, PROFILE)
    assert (setting.profile.factors, setting.profile.excess) == ({8: 1.5}, (0.5, 0.5, -0.25, -0.25))


def test_clients_fork_would_rather_be_refused_and_kv_is_reserved_as_it_was() -> None:
    real = result("light", "off", 2.0)
    ((plain, _),) = settings(real, PROFILE)
    assert (plain.fork, plain.slo.reject, plain.reserve) == ("server", False, 1.0)
    ((other, _),) = settings(real | {"fork": "client", "reject_late": True, "reserve": 0.5}, PROFILE)
    assert (other.fork, other.slo.reject, other.reserve) == ("client", True, 0.5)


def test_nine_of_ten_rows_are_enough_and_the_others_are_named() -> None:
    rows = [{"run": f"run {number}", "agrees": number != 3} for number in range(10)]
    assert verdict(rows) == {"share": 0.9, "enough": True, "outside": ["run 3"]}
    assert text(verdict(rows) | {"rows": rows}) == "90% of 10 rows agree, which is enough; outside: run 3"
    assert not verdict(rows[:4])["enough"]


def test_other_requests_than_those_measured_are_refused() -> None:
    real = result("light", "off", 2.0)
    real["points"][0]["sha256"] = "other"
    with pytest.raises(ValueError, match="not what it was"):
        settings(real, PROFILE)


def test_a_closed_loops_load_is_its_clients() -> None:
    real = result("light", "off", 2.0)
    clients = named("light", 3, 3.5, clients=2)
    real["points"] = [{"load": 2, "seed": 3, "closed": True, "sha256": clients.digest}]
    real["rows"][0]["load"] = 2
    ((setting, policy),) = settings(real, replace(PROFILE, name="other"))
    assert (setting.workload.clients, setting.window.drain, policy) == (2, 60.0, "off")


def test_what_was_scaled_is_scaled_again() -> None:
    real = result("light", "off", 2.0)
    smaller = named("light", 3, 3.5, rate=2.0).scaled(0.5)
    real["scale"], real["points"][0]["sha256"] = 0.5, smaller.digest
    ((setting, _),) = settings(real, PROFILE)
    assert setting.workload == smaller


def test_a_folder_stands_for_its_results(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).touch()
    assert files([Path("x.json"), tmp_path]) == [Path("x.json"), tmp_path / "a.json", tmp_path / "b.json"]
