"""Timing the scheduler: every part is timed, in steps in which all branches run."""

from __future__ import annotations

import pytest

from bench.host import scheduling
from bench.host.scheduling import measure


def test_a_plan_takes_longer_than_the_decisions_in_it() -> None:
    row = measure(requests=16, branches=8, plans=10)
    assert 0 < row["planner_p50_ms"] < row["plan_p50_ms"]
    assert row["update_p50_ms"] > 0


def test_times_are_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "times", lambda *_: {"plan": [0.001, 0.002, 0.003]})
    row = measure(requests=2, branches=3, plans=4)
    assert (row["requests"], row["branches"], row["plans"]) == (2, 3, 4)
    assert (row["plan_p50_ms"], row["plan_p99_ms"]) == pytest.approx((2.0, 2.98))


def test_prompts_are_not_shared_and_none_has_to_wait_for_pages() -> None:
    config = scheduling.scheduler(2, 3).config
    assert not config.prefix_cache
    assert config.num_pages * config.page_size >= 2 * 3 * 10_000
