"""A file of steps says what each held, and what it was predicted to take and took."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import structlog

from scheduler.predictor import StepLoad
from scheduler.step import Entry, FinishedStep, Forecast, SegmentRead, Step
from serve.door import StepRecord
from serve.engine.step_log import Moments, StepLog, read_steps, record

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")


def entry(request: str, branch: int, *, samples: bool = True) -> Entry:
    read = SegmentRead((0,), 1)
    return Entry(request, branch, 0, 0 if samples else None, 0, 0, 1, None, (), read, samples, ())


def finished(*entries: Entry, budget: float = 0.025) -> FinishedStep:
    deferred = (("a", 3), ("b", 4))
    forecast = Forecast(StepLoad(len(entries)), 0.02, 0.015, budget_seconds=budget, deferred=deferred)
    return FinishedStep(Step(1, entries, slots=(), bucket=8), forecast, 0.03)


def moments(ended: float) -> Moments:
    return Moments(
        planned=1.0,
        launching=2.0,
        launched=3.0,
        looked=4.0,
        ended=ended,
        published=8.0,
        idle=0.25,
        ready=True,
        paused=0.125,
    )


def test_a_record_says_what_a_step_held_and_what_was_expected_of_it() -> None:
    step = finished(entry("a", 1), entry("a", 2), entry("c", 1), entry("b", 0, samples=False))
    assert record(step, moments(7.5)) == StepRecord(
        ended=7.5,
        bucket=8,
        load=StepLoad(4),
        requests=2,
        branches=3,
        deferred=2,
        predicted=0.02,
        baseline=0.015,
        budget=0.025,
        seconds=0.03,
        widths=(2, 1),
        planned=1.0,
        launching=2.0,
        launched=3.0,
        looked=4.0,
        published=8.0,
        idle=0.25,
        ready=True,
        paused=0.125,
    )


def test_a_record_becomes_a_line_and_comes_back_without_the_widths(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps")
    written = record(finished(entry("a", 1), entry("a", 2)), moments(7.5))
    log.write(written)
    log.close()
    (read,) = read_steps((tmp_path / "steps").read_text().splitlines(keepends=True))
    assert read == written._replace(widths=())


def test_a_step_without_a_budget_is_still_strict_json(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps")
    log.write(record(finished(entry("a", 0), budget=math.inf), moments(0.0)))
    log.close()
    line = (tmp_path / "steps").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["budget"] is None


def test_lines_reach_the_file_while_the_server_runs_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps")
    for number in range(4):
        log.write(record(finished(entry("a", 0)), moments(0.9 * number * StepLog.FLUSH_SECONDS)))
    written = (tmp_path / "steps").read_text()
    assert len([*read_steps(written.splitlines(keepends=True))]) == 3
    assert len([*read_steps((written + '{"ended": 1').splitlines(keepends=True))]) == 3
    log.close()


def test_a_log_from_before_a_figure_was_written_can_be_read(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps")
    written = record(finished(entry("a", 0)), moments(7.5))
    log.write(written)
    log.close()
    line = json.loads((tmp_path / "steps").read_text())
    for later in ("planned", "launching", "launched", "looked", "published", "idle", "ready", "paused"):
        del line[later]
    (read,) = read_steps([json.dumps(line) + "\n"])
    assert (read.ended, read.seconds, read.idle, read.ready) == (7.5, written.seconds, 0.0, False)


@full
@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_a_full_disk_ends_the_log_and_nothing_else(seconds: float) -> None:
    log = StepLog(Path("/dev/full"))
    with structlog.testing.capture_logs() as said:
        for number in range(3):
            log.write(record(finished(entry("a", 0)), moments(number * seconds)))
        log.close()
        log.close()
    assert [each["event"] for each in said] == ["the step log is given up"]
    assert "No space left" in said[0]["error"]


@full
def test_a_disk_that_is_full_at_the_end_is_told_of_too(monkeypatch: pytest.MonkeyPatch) -> None:
    log = StepLog(Path("/dev/full"))
    monkeypatch.setattr(log, "FLUSH_SECONDS", math.inf)
    log.write(record(finished(entry("a", 0)), moments(7.5)))
    with structlog.testing.capture_logs() as said:
        log.close()
    assert [each["event"] for each in said] == ["the step log is given up"]
