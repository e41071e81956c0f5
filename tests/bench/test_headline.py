"""The comparison of the results page: planned, made in parts, and never made twice."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import headline, pictures
from bench.headline import OTHERS, RIVALS, SEEDS, expected_seconds, main, plan, summaries, table
from bench.load import trial
from bench.load.measures import Window
from bench.load.runs import Load, Made, Run, made, results
from bench.load.workload import Item
from scheduler.predictor import StepLoad
from serve.door import StepRecord
from serve.engine.step_log import StepLog
from tests.bench.served import serving

QUICK = ["--warmup", "0.1", "--window", "0.3", "--cooldown", "0.1", "--scale", "0.03", "--minutes", "9"]
PLANNED = plan()
LOAD = Load("headline", 15)
BY_CLIENT, REFUSED = LOAD._replace(fork="client"), LOAD._replace(reject=True)


@dataclass
class Server:
    """One without a model, and the arguments that it was started with."""

    arguments: list[str]
    starts: int = 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A plan of runs that a server without a model makes in moments."""
    blocks = [
        ([LOAD], ["taper", "off"], [1]),
        ([BY_CLIENT, REFUSED], ["taper"], [1]),
        ([LOAD], ["taper", "off"], [1, 2]),
        ([LOAD], ["cap:2"], [1]),
    ]
    monkeypatch.setattr(headline, "ORDER", blocks)
    monkeypatch.setattr(headline, "LOADS", (LOAD, BY_CLIENT, REFUSED))
    monkeypatch.setattr(headline, "OVERLOADS", (REFUSED,))
    monkeypatch.setattr(trial, "ALONE", Item(0.0, 20, ((200,),)))
    told = Server([])
    with serving() as server:

        def started(arguments: list[str]) -> Any:
            told.arguments, told.starts = arguments, told.starts + 1
            return contextlib.nullcontext(server)

        monkeypatch.setattr(headline, "started", started)
        yield told


# --- the plan ----------------------------------------------------------------------------------------------


def test_a_dozen_runs_tell_the_most() -> None:
    """Rivals where taper is to keep its promises; a client that forks; taper elsewhere; seeds; overload."""
    kept = (("headline", 1.4), ("headline", 1.8), ("headline-closed", 40))
    others = (("headline", 1.6), ("mixed", 3.4))
    first = [(run.load.workload, run.load.amount, run.policy) for run in PLANNED[:12]]
    assert first == [(*load, policy) for load in kept for policy in RIVALS]
    assert str(PLANNED[12]) == "taper at headline 1.4, forked by the client, seed 1"
    assert [(run.load.workload, run.load.amount) for run in PLANNED[13:15]] == [*others]
    assert [str(run.load) for run in PLANNED[27:30]] == [
        "headline 1.6, refused if late",
        "headline 2.1, refused if late",
        "headline 2.1",
    ]
    assert {run.seed for run in PLANNED[:15]} == {1}


def test_every_run_is_planned_once() -> None:
    loads, seeds = 5, len(SEEDS)
    by_client, overload = 2 * seeds, 3
    assert (
        len({*PLANNED}) == len(PLANNED) == loads * (len(RIVALS) * seeds + len(OTHERS)) + by_client + overload
    )
    assert len({run.file for run in PLANNED}) == len(PLANNED)


# --- running -----------------------------------------------------------------------------------------------


@pytest.mark.full
def test_what_a_folder_lacks_is_made_and_nothing_twice(
    small: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(main([str(tmp_path)])["missing"]) == 7  # no minutes, no run
    drawn: list[int] = []
    monkeypatch.setattr(pictures, "headline", lambda sources, path: drawn.append(len(sources)))
    assert main([str(tmp_path), "--plot", "PNG", *QUICK, "--", "--max-queue", "9"])["missing"] == []
    assert (small.starts, small.arguments) == (1, ["--max-queue", "9"])
    assert drawn == [1 + 7], "of the simulated lines and all runs"
    assert {path.name for path in tmp_path.iterdir()} == {run.file for run in plan()}
    found = made(results(tmp_path))
    assert {*found} == {*plan()}
    targets = [each.result["tpot_slo_ms"] for each in found.values()]
    assert targets == pytest.approx([targets[0]] * 7, rel=1e-9), "one server, one target"
    windows = Counter(each.result["window_s"] for each in found.values())
    assert windows == {0.3: 6, 0.45: 1}, "overload is measured for longer"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    main([str(tmp_path), *QUICK])
    assert small.starts == 1
    printed = capsys.readouterr().out
    assert "7 runs are there, 0 are missing" in printed
    assert printed.count("\ntaper      1,2 ") == 1

    lost = tmp_path / Run(BY_CLIENT, 1, "taper").file
    lost.unlink()
    assert main([str(tmp_path), *QUICK])["missing"] == []
    assert before == before | {path: path.read_bytes() for path in before if path != lost}


def test_a_run_that_would_not_end_is_passed_over(small: Server, tmp_path: Path) -> None:
    assert len(main([str(tmp_path), *QUICK, "--minutes", "0.001"])["missing"]) == 7
    assert small.starts == 1


def test_calls_at_the_same_time_share_the_runs(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by: list[list[Run]] = []
    monkeypatch.setattr(headline, "make", lambda wanted, *_: made_by.append([*wanted]))
    for part in ("1/2", "2/2"):
        main([str(tmp_path), *QUICK, "--part", part])
    assert made_by == [plan()[0::2], plan()[1::2]]
    main([str(tmp_path), *QUICK, "--part", "2/2", "--only", "*-seed1-off.json", "*-cap?.json"])
    assert [run.policy for run in made_by.pop()] == ["cap:2"], "of what was asked for"
    for wrong in ("0/2", "3/2", "2"):
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--part", wrong])


def test_a_run_takes_what_it_took_with_another_seed_or_what_its_kind_does() -> None:
    there = {Run(LOAD, 1, "off"): Made({"run_s": 7.0}, {}), Run(LOAD, 1, "taper"): Made({"run_s": 3.0}, {})}
    window = Window(20.0, 50.0, drain=900.0)
    assert expected_seconds(Run(LOAD, 2, "off"), there, window) == 7.0
    assert expected_seconds(Run(LOAD, 2, "cap:4"), there, window) == 50.0 + 80.0
    assert expected_seconds(Run(REFUSED, 1, "off"), there, window) == 50.0 + 150.0
    assert expected_seconds(Run(BY_CLIENT, 1, "taper"), there, window) == 50.0 + 100.0
    assert expected_seconds(Run(REFUSED, 1, "off"), there, Window(20.0, 50.0, drain=9.0)) == 59.0


def test_the_servers_arguments_say_what_it_reserves_and_where_its_steps_are_written(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headline, "plan", lambda: [Run(LOAD, 1, "taper")])
    logs: list[Path] = []
    monkeypatch.setattr(headline, "lateness", lambda log, *_: logs.append(log))
    main([str(tmp_path), *QUICK, "--", "--reserve", "0.5", "--step-log=STEPS"])
    (result,) = results(tmp_path)
    assert (result["reserve"], logs) == (0.5, [Path("STEPS")])
    monkeypatch.setattr(headline, "plan", lambda: [Run(LOAD, seed, "taper") for seed in (1, 2)])
    with pytest.raises(SystemExit, match=r"seed1-taper\.json is of a server with --reserve 0\.5"):
        main([str(tmp_path), *QUICK])
    with pytest.raises(SystemExit, match=r"seed1-taper\.json has a window of 0\.3 s"):
        main([str(tmp_path), *QUICK, "--window", "0.4", "--", "--reserve", "0.5"])
    other = tmp_path / Run(LOAD, 0, "taper").file  # sorts before the first
    point = result["points"][0] | {"seed": 0}
    row = result["rows"][0] | {"seed": 0}
    other.write_text(json.dumps(result | {"points": [point], "rows": [row]}))
    (tmp_path / Run(LOAD, 1, "taper").file).write_text(json.dumps(result | {"reserve": 1.0}))
    with pytest.raises(SystemExit, match=r"seed1-taper\.json is of a server with --reserve 1"):
        main([str(tmp_path), *QUICK, "--", "--reserve", "0.5"])


def test_windows_are_as_long_as_they_were_asked_for_and_longer_in_overload(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[tuple[Run, Window]] = []

    def never(run: Run, there: Any, window: Window) -> float:
        windows.append((run, window))
        return math.inf

    monkeypatch.setattr(headline, "expected_seconds", never)
    main([str(tmp_path), *QUICK, "--drain", "7"])
    assert {run for run, _ in windows} == {*plan()}
    for run, window in windows:
        seconds = 0.45 if run.load == REFUSED else 0.3
        assert (window.warmup, window.seconds, window.drain) == (0.1, pytest.approx(seconds), 7.0)


def test_a_folder_goes_on_although_a_window_was_rounded_when_it_was_written(
    small: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headline, "plan", lambda: [Run(REFUSED, 1, "taper")])
    assert main([str(tmp_path), *QUICK])["missing"] == []
    monkeypatch.setattr(headline, "plan", lambda: [Run(REFUSED, seed, "taper") for seed in (1, 2)])
    assert main([str(tmp_path), *QUICK])["missing"] == []
    assert {result["window_s"] for result in results(tmp_path)} == {0.45}


def test_a_row_has_the_lateness_of_its_own_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = StepLog(tmp_path / "steps")
    for moment in range(20):
        log.write(StepRecord(float(moment), 8, StepLoad(3), 2, 3, 0, 0.020, 0.015, None, 0.030))
    log.close()
    found = headline.lateness(tmp_path / "steps", {"began_s": 4.0, "run_s": 10.0}, "h200-qwen3-32b")
    assert found is not None
    assert len(found["excess"]) == 10
    assert headline.lateness(tmp_path / "steps", {"began_s": 40.0, "run_s": 1.0}, "h200-qwen3-32b") is None
    assert "no step" in capsys.readouterr().err


# --- the table ---------------------------------------------------------------------------------------------


def a_run(policy: str, goodput: float, seed: int = 1, cores: int = 16, **row: Any) -> dict[str, Any]:
    """A result with one row of ten requests, as far as the table is of it."""
    point = {"load": 1.4, "seed": seed}
    figures = dict.fromkeys(headline.MEANS, 1.0) | {"goodput_stage": goodput, "gap_p99_ms": 45.0}
    return {
        "workload": "headline",
        "points": [point],
        "rows": [point | figures | {"policy": policy, "arrived": 10, "attainment_stage": 1.0} | row],
        "tpot_slo_ms": 30.0,
        "time": f"2026-01-01T00:00:{cores:02}Z",
        "python_ms": 10.0 + seed,
        "client": {"host": "x86_64, a processor"},
        "server": {"device": "a card"},
        "host": {"cores": cores, "boot": "b", "driver": "d", "versions": {"jax": "j"}, "commit": "c"},
    }


def test_taper_is_compared_at_the_same_seeds() -> None:
    runs = made(
        [
            a_run("taper", 300.0),
            a_run("taper", 100.0, seed=2, attainment_stage=0.9, gap_p99_ms=60.0),
            a_run("off", 100.0),
            a_run("eager", 0.0),
        ]
    )
    taper, eager, off = summaries(runs)
    assert (taper.over, eager.over, off.over) == (1.0, None, 3.0)
    assert (taper.seeds, taper.late, taper.attained) == ([1, 2], [0, 1], 0.95)
    assert taper.gap == 2.0, "the longest, in targets"
    assert taper.means["goodput_stage"] == 200.0


def test_the_table_tells_hosts_apart() -> None:
    runs = made([a_run("off", 1.0), a_run("taper", 1.0, cores=8), a_run("taper", 1.0, seed=2)])
    lines = table(runs).splitlines()
    assert lines[0] == "headline 1.4"
    assert [line.split()[-1] for line in lines[2:4]] == ["AB", "B"]
    assert lines[4].startswith(
        "A: a card (driver d), 8 cores of x86_64, a processor (boot b), jax j, commit c"
    )
    assert lines[5].endswith("a loop of Python's in 11.0 to 12.0 ms; runs: 2")
