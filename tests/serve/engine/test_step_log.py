"""A file of steps says what each held, and what it was predicted to take and took."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.predictor import StepLoad
from serve.engine.step_log import StepLog, StepRecord, read_steps
from tests.serve.server.test_metrics import entry, step


def test_a_step_becomes_a_line_and_comes_back(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps", clock=lambda: 7.5)
    log.observe_step(step(entry("a", 1), entry("a", 2), entry("b", 0, samples=False)))
    log.close()
    (read,) = read_steps((tmp_path / "steps").read_text().splitlines(keepends=True))
    assert read == StepRecord(
        ended=7.5,
        bucket=8,
        load=StepLoad(3),
        requests=1,
        branches=2,
        deferred=0,
        predicted=0.02,
        baseline=0.015,
        budget=0.02,
        seconds=0.03,
    )


def test_a_step_without_a_budget_is_still_strict_json(tmp_path: Path) -> None:
    finished = step(entry("a", 0))
    log = StepLog(tmp_path / "steps")
    unlimited = replace(finished.forecast, budget_seconds=math.inf)
    log.observe_step(replace(finished, forecast=unlimited))
    log.close()
    line = (tmp_path / "steps").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["budget"] is None


def test_lines_reach_the_file_while_the_server_runs_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    now = 0.0
    log = StepLog(tmp_path / "steps", clock=lambda: now)
    for _ in range(3):
        now += 0.9 * StepLog.FLUSH_SECONDS
        log.observe_step(step(entry("a", 0)))
    written = (tmp_path / "steps").read_text()
    assert len([*read_steps(written.splitlines(keepends=True))]) == 2
    assert len([*read_steps((written + '{"ended": 1').splitlines(keepends=True))]) == 2
    log.close()
