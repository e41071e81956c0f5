from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from bench.load.workload import open_loop
from bench.simulate import policies
from bench.simulate.simulation import Profile, targets

PROFILE = Profile.load("h200-qwen3-32b")
KEYS = {
    "policy", "goodput_mean", "attainment_mean", "goodput_stage", "attainment_stage", "goodput_critical",
    "attainment_critical", "serial_attainment", "parallel_attainment", "ttft_attainment", "raw_tokens_s",
    "mean_width", "e2e_p50_s", "e2e_p99_s", "serial_tpot_p99_ms",
}  # fmt: skip


class InOneProcess:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> InOneProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...

    map = staticmethod(map)


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
