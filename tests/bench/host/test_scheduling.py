"""Timing the scheduler: every part is timed, in steps in which all branches run."""

from __future__ import annotations

from bench.host.scheduling import measure


def test_a_plan_takes_longer_than_the_decisions_in_it() -> None:
    row = measure(requests=16, branches=8, plans=10)
    assert 0 < row["planner_p50_ms"] < row["plan_p50_ms"]
    assert row["update_p50_ms"] > 0
