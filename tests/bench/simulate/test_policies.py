from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from bench.load.measures import Window
from bench.load.workload import named, open_loop
from bench.simulate import policies
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, targets
from scheduler.controller import ControllerConfig
from scheduler.request import Slo
from tests.bench.simulate.in_one_process import InOneProcess

PROFILE = Profile.load("h200-qwen3-32b")
KEYS = {
    "policy", "goodput_mean", "attainment_mean", "goodput_stage", "attainment_stage", "goodput_critical",
    "attainment_critical", "serial_attainment", "parallel_attainment", "ttft_attainment", "raw_tokens_s",
    "good_tokens_s", "refused", "accepted_attainment", "mean_width", "e2e_p50_s", "e2e_p99_s",
    "serial_tpot_p99_ms",
}  # fmt: skip


STEP = {
    "ended": 1.0,
    "bucket": 8,
    "load": {"rows": 3},
    "requests": 2,
    "branches": 3,
    "deferred": 0,
    "predicted": 0.5,
    "baseline": 0.4,
    "budget": None,
}


def test_the_command_prints_strict_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    open_loop("light", "poisson", 1.0, 3.0, seed=1).save(tmp_path / "w.json")
    monkeypatch.setattr(policies, "in_processes", InOneProcess)
    options = ["--workload", str(tmp_path / "w.json"), "--policies", "off,taper", "--warmup", "0"]
    policies.main([*options, "--window", "3", "--json", "-"])
    result = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [each["policy"] for each in result["rows"]] == ["off", "taper"]
    assert all(set(each) == KEYS for each in result["rows"])
    assert result["rows"][0]["serial_attainment"] is None
    assert math.isclose(result["tpot_slo_ms"], 1e3 * targets(PROFILE).tpot)


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench.simulate", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("bench.simulate", run_name="__main__", alter_sys=True)
    assert done.value.code == 0
    assert "usage: python -m bench.simulate [-h] [--json JSON]" in capsys.readouterr().out


def test_every_option_reaches_the_setting(tmp_path: Path) -> None:
    """Each differs from its default, so that one that is not passed on is noticed."""
    typed = (
        "--workload light --rate 3 --seed 7 --warmup 2 --window 4 --cooldown 1 --drain 5 --tpot-slo 0.125 "
        "--reserve 0.75 --fork client --reject-late --max-chunk 100 --prompt-floor 3 --exact --page 32"
    )
    options = policies.command().parse_args([*typed.split(), "--controller", '{"rho": 0.5, "repay": 2.0}'])
    assert policies.setting_of(options) == Setting(
        profile=replace(
            PROFILE, noise=(), page_size=32, num_pages=PROFILE.num_pages * PROFILE.page_size // 32
        ),
        workload=named("light", 7, 7.0, rate=3.0),
        slo=Slo(tpot=0.125, ttft=5.0, reject=True),
        window=Window(2.0, 6.0, 5.0),
        seed=7,
        reserve=0.75,
        fork="client",
        controller=ControllerConfig(rho=0.5, repay=2.0, max_chunk=100, prompt_floor=3),
    )
    log = tmp_path / "steps"
    log.write_text("".join(json.dumps(STEP | {"seconds": seconds}) + "\n" for seconds in (0.5, 0.625, 0.25)))
    options = policies.command().parse_args(["--workload", "light", "--step-log", str(log)])
    assert policies.setting_of(options).profile == replace(PROFILE, excess=(0.0, 0.25, -0.5))
    options = policies.command().parse_args(["--workload", "light", "--clients", "2"])
    setting = policies.setting_of(options)
    assert (setting.profile, setting.slo) == (PROFILE, targets(PROFILE))
    assert setting.workload == named("light", 1, 105.0, clients=2)
