from __future__ import annotations

from bench.load.server_metrics import late_shares, scrape, server_row


def test_metrics_are_those_of_the_time_between_two_scrapes() -> None:
    before = {
        "step_sum": 1.0,
        "step_count": 10.0,
        "tokens_total": 5.0,
        'x_sum{a="b"}': 0.0,
        'x_count{a="b"}': 0.0,
    }
    after = {
        "step_sum": 4.0,
        "step_count": 16.0,
        'step_bucket{le="1"}': 3.0,
        "step_created": 1e9,
        "tokens_total": 25.0,
        'x_sum{a="b"}': 0.0,
        'x_count{a="b"}': 0.0,
        "running": 2.0,
        "unknown": float("nan"),
    }
    assert server_row(before, after) == {
        "step": 0.5,
        "step_count": 6.0,
        "tokens_total": 20.0,
        'x{a="b"}': None,
        'x_count{a="b"}': 0.0,
        "running": 2.0,
        "unknown": None,
    }
    appeared = {'y_sum{a="new"}': 6.0, 'y_count{a="new"}': 4.0}
    assert server_row(before, appeared) == {'y{a="new"}': 1.5, 'y_count{a="new"}': 4.0}
    assert server_row({}, {}) == scrape(None) == {}


def test_late_steps_are_shares_of_all_steps_by_cause() -> None:
    late = {
        f'late_steps_total{{cause="{cause}"}}': count for cause, count in (("launch", 2.0), ("seen", 0.0))
    }
    row = late | {"step_seconds_count": 40.0}
    assert late_shares(row) == {
        "late_launch": 0.05,
        "late_seen": 0.0,
        "late_paused": None,
        "late_device": None,
    }
    assert {*late_shares(late).values()} == {*late_shares({}).values()} == {None}
    assert late_shares(late | {"step_seconds_count": 0.0})["late_launch"] is None
