"""The host's share of a step is counted over both processes, in steps in which all requests take part."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.host import processes
from bench.host.processes import Counts, Device, Setting
from bench.host.serving import WIDTHS, items, main, steps_of, unevenness
from serve.door import StepRecord
from tests.serve.fakes import STEP


@pytest.mark.full
def test_a_small_load_is_measured_over_both_processes(tmp_path: Path) -> None:
    target = tmp_path / "host.json"
    asked = ["--streams", "3", "--widths", "1,2", "--steps", "40", "--device-ms", "4", "--prompt-tokens", "9"]
    main([*asked, "--pages", "64", "--json", str(target)])
    found = json.loads(target.read_text())
    assert found["options"]["streams"] == 3
    assert 25 <= found["steps"] <= 40
    assert found["rows"] == 1 + 2 + 1
    assert 3.5 < found["step"]["median_ms"] < 50, "the device takes as long, and a busy machine longer"
    assert found["machine"]["median_ms"] > 3.5
    assert {*found["late"]} == {"launch", "seen", "paused", "device"}
    engine, server = found["processes"]["engine"], found["processes"]["server"]
    assert {*engine["parts"]} == {"schedule", "update", "lay out", "launch", "tell", "hear"}
    assert engine["parts"]["launch"]["wait_ms"] >= 0.9, "a launch sleeps"
    assert 0 < engine["parts"]["schedule"]["cpu_ms"] < engine["cpu_ms"]
    assert server["cpu_ms"] > 0
    assert found["python_ms"] > 0


def test_streams_have_their_branches_in_turn() -> None:
    made = items(64, WIDTHS, 256, 600)
    assert sum(len(item.stages[-1]) for item in made) == 168
    assert {item.stages[-1][0] for item in made} == {600}


def test_steps_count_in_which_all_take_part_and_that_follow_another() -> None:
    on_time = STEP._replace(predicted=0.01, seconds=0.01, idle=0.0, paused=0.0, ready=False)

    def step(ended: float, requests: int, **changed: float) -> StepRecord:
        return on_time._replace(ended=ended, requests=requests, **changed)

    late = step(2.03, 2, seconds=0.02, idle=0.01)
    records = [step(1.0, 1), step(2.0, 2), step(2.01, 2), late, step(2.04, 1)]
    found = steps_of(records, requests=2)
    assert found["steps"] == 2
    assert found["step"]["median_ms"] == pytest.approx(15)
    assert found["idle_ms"] == pytest.approx(5)
    assert found["late"] == {"launch": 0.5, "seen": 0.0, "paused": 0.0, "device": 0.0}


def test_a_part_counts_cpu_and_what_it_waited_for(tmp_path: Path) -> None:
    counts = Counts(Setting(device_ms=1, launch_ms=1, folder=str(tmp_path), requests=2))
    asleep = counts.part("asleep", lambda: time.sleep(0.02))
    busy = counts.part("busy", lambda: sum(range(200_000)))
    for requests in (1, 2, 2, 2):
        asleep()
        busy()
        counts.step(STEP._replace(requests=requests))
    counts.write(tmp_path / "counts")
    found = json.loads((tmp_path / "counts").read_text())
    assert found["steps"] == 2
    assert found["parts"]["asleep"]["wait_ms"] > 15
    assert found["parts"]["asleep"]["cpu_ms"] < 5
    assert found["parts"]["busy"]["cpu_ms"] > 0.5
    assert found["cpu_ms"] >= found["parts"]["busy"]["cpu_ms"]


def test_counts_are_written_once(tmp_path: Path) -> None:
    counts, target = Counts(Setting(device_ms=1, launch_ms=1, folder="", requests=2)), tmp_path / "counts"
    counts.write(target)
    first = target.read_text()
    counts.step(STEP._replace(requests=2))
    counts.step(STEP._replace(requests=2))
    counts.write(target)
    assert target.read_text() == first, "a process that ends meanwhile would leave half of it"


def test_the_device_begins_when_a_launch_has_reached_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds + 0.5  # until the caller has the interpreter again

    monkeypatch.setattr(processes.time, "perf_counter", lambda: now)
    monkeypatch.setattr(processes.time, "sleep", sleep)
    device = Device(Setting(device_ms=6, launch_ms=1, folder="", requests=1))
    tokens, *_ = device.run(1, 8)
    now = 0.0069
    assert not tokens.is_ready()
    now = 0.0071
    assert tokens.is_ready()


def test_a_spread_is_in_milliseconds() -> None:
    assert unevenness([0.001] * 99 + [0.002]) == pytest.approx(
        {"median_ms": 1.0, "p99_ms": 1.01, "p99_over_median": 1.01}, abs=1e-3
    )
