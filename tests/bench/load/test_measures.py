from __future__ import annotations

from typing import Any

import pytest

from bench.load.measures import Record, Run, Window, cells, merged_stages, quantile, share, titles
from bench.load.workload import Item
from scheduler.request import Slo
from tests.bench.load.records import seen


def row(*records: Record, tpot: float = 0.031) -> dict[str, Any]:
    """Of a window of 10 s."""
    slo = Slo(tpot=tpot, ttft=5.0)
    return Run(policy="off", slo=slo, seconds=10.0, records=records, tokens=0, good_tokens=0, turns=0).row()


def test_stages_end_with_their_last_token() -> None:
    item = Item(0.0, 1, ((20,), (16, 14), (20,)))
    record = seen(item, 5.0, *[1.0] * 19, *[0.5] * 30, *[3.0] * 20, arrival=4.0)
    assert record.finished
    assert record.ttft == 1.0
    assert record.stage_ends == [24.0, 39.0, 99.0]
    assert merged_stages(record) == [(5.0, 24.0, 19, 19), (24.0, 39.0, 30, 16), (39.0, 99.0, 20, 20)]
    assert record.mean_tpot == pytest.approx((19 + 15 + 60) / 69)
    assert record.stage_tpot == 3.0
    assert record.critical_tpot == 3.0


def test_tokens_that_come_together_end_their_stages_together() -> None:
    item = Item(0.0, 1, ((2,), (3, 2), (1,)))
    record = Record(item, 0.0)
    for now, tokens in ((1.0, 1), (2.0, 3), (3.0, 4)):
        record.emit(now, tokens)
    assert (record.first, record.last, record.tokens) == (1.0, 3.0, 8)
    assert record.stage_ends == [2.0, 3.0, 3.0]


def test_a_short_stage_counts_with_the_next_and_a_short_last_one_with_the_one_before() -> None:
    item = Item(0.0, 1, ((4,), (8, 8), (15,)))
    record = seen(item, 0.0, *[2.0] * 3, *[1.0] * 16, *[4.0] * 15)
    assert merged_stages(record) == [(0.0, 82.0, 34, 26)]
    assert record.stage_tpot == pytest.approx(82 / 34)
    short = seen(Item(0.0, 1, ((3,),)), 1.0, 0.5, 0.5)
    assert merged_stages(short) == [(1.0, 2.0, 2, 2)]
    single = seen(Item(0.0, 1, ((1,),)), 1.0)
    assert (single.mean_tpot, single.stage_tpot, single.critical_tpot) == (0.0, 0.0, 0.0)


def test_a_stage_of_sixteen_tokens_stands_alone_also_the_first() -> None:
    record = seen(Item(0.0, 1, ((16,), (8, 8), (16,))), 0.0, *[1.0] * 47)
    assert [stage.tokens for stage in merged_stages(record)] == [15, 16, 16]
    fewer = seen(Item(0.0, 1, ((15,), (8, 7), (16,))), 0.0, *[1.0] * 45)
    assert [stage.tokens for stage in merged_stages(fewer)] == [29, 16]


def test_the_mean_hides_a_slow_stage_that_the_stage_measure_shows() -> None:
    item = Item(0.0, 1, ((20,), (100, 100), (20,)))
    record = seen(item, 1.0, *[0.03] * 19, *[0.01] * 200, *[0.04] * 20)
    result = row(record)
    assert (result["attainment_mean"], result["attainment_stage"]) == (1.0, 0.0)
    assert (result["goodput_mean"], result["goodput_stage"]) == (24.0, 0.0)


def test_the_critical_path_counts_the_longest_branch_alone() -> None:
    """It shows what the stage measure hides: branches that take turns."""
    record = seen(Item(0.0, 1, ((17,), (100, 60))), 1.0, *[0.03] * 16, *[0.02] * 160)
    assert record.stage_tpot == pytest.approx(0.03)
    assert record.critical_tpot == pytest.approx(160 * 0.02 / 100)
    result = row(record)
    assert (result["attainment_stage"], result["attainment_critical"]) == (1.0, 0.0)
    assert (result["goodput_stage"], result["goodput_critical"]) == (17.7, 0.0)


def test_everything_is_in_the_denominator() -> None:
    serial, parallel = Item(0.0, 1, ((20,),)), Item(0.0, 1, ((20, 20),))
    records = [
        seen(serial, 11.0, *[0.01] * 19, arrival=10.0),
        seen(serial, 11.0, 0.01, arrival=12.0),  # not finished
        Record(serial, 13.0),  # not started
        seen(serial, 19.0, *[0.01] * 19, arrival=13.5),  # its first token is late
        seen(parallel, 20.5, *[0.02] * 39, arrival=19.9),
    ]
    result = row(*records)
    assert result["attainment_stage"] == 2 / 5
    assert result["serial_attainment"] == 1 / 4
    assert result["parallel_attainment"] == 1.0
    assert result["ttft_attainment"] == 2 / 5
    assert result["goodput_stage"] == (20 + 40) / 10


def test_a_request_that_just_meets_its_targets_is_good() -> None:
    record = seen(Item(0.0, 1, ((20,),)), 2.0, *[0.5] * 19)
    assert record.good(Slo(tpot=0.5, ttft=2.0), "mean")
    assert not record.good(Slo(tpot=0.5, ttft=1.99), "mean")
    assert not record.good(Slo(tpot=0.49, ttft=2.0), "mean")


def test_serial_and_parallel_attainment_are_of_the_stage_measure() -> None:
    """One branch of sixteen tokens and then the trunk: slow stages, and a mean that hides them."""
    serial = seen(Item(0.0, 1, ((20,), (200,))), 1.0, *[0.04] * 19, *[0.01] * 200)
    parallel = seen(Item(0.0, 1, ((20,), (100, 100))), 1.0, *[0.04] * 19, *[0.01] * 200)
    for record, kind in ((serial, "serial"), (parallel, "parallel")):
        result = row(record)
        assert (result["attainment_mean"], result[f"{kind}_attainment"]) == (1.0, 0.0)


def test_a_ratio_with_nothing_below_is_null() -> None:
    assert share([]) is None
    assert quantile([], 0.5) is None
    empty = row()
    assert empty.pop("policy") == "off"
    rates = {key for key in empty if key.startswith(("good", "raw"))}
    assert {empty[key] for key in empty.keys() - rates} == {None}
    assert {empty[key] for key in rates} == {0.0}


def test_percentiles_are_of_what_finished() -> None:
    """Answers of two tokens: the n-th takes n / 100 s for the second one, after a first one at 1 s."""
    serial, parallel = Item(0.0, 1, ((2,),)), Item(0.0, 1, ((1, 1),))
    records = [seen(serial, 1.0, n / 100) for n in range(101)]
    assert quantile([3.0, 1.0, 2.0], 0.9) == pytest.approx(2.8)
    found = row(*records)
    assert (found["e2e_p50_s"], found["e2e_p99_s"]) == (pytest.approx(1.5), pytest.approx(1.99))
    assert found["serial_tpot_p99_ms"] == pytest.approx(990)
    others = [seen(parallel, 1.0, 50.0) for _ in range(101)]
    unfinished = [seen(Item(0.0, 1, ((9,),)), 1.0, 70.0) for _ in range(101)]
    found = row(*records, *others, *unfinished)
    assert found["serial_tpot_p99_ms"] == pytest.approx(990), "neither of branches nor of what did not finish"
    assert found["e2e_p99_s"] == pytest.approx(51)


def test_a_window_has_its_begin_and_not_its_end() -> None:
    window = Window(10.0, 40.0)
    assert [at in window for at in (9.99, 10.0, 39.99, 40.0)] == [False, True, True, False]
    assert window.seconds == 30.0
    assert 1e9 in Window()


def test_a_runs_rate_and_width_are_of_what_came_in_its_window() -> None:
    counted = {"tokens": 300, "good_tokens": 200, "turns": 60}
    row = Run(policy="off", slo=Slo(tpot=1.0, ttft=1.0), seconds=20.0, records=[], **counted).row()
    assert (row["raw_tokens_s"], row["good_tokens_s"], row["mean_width"]) == (15.0, 10.0, 5.0)


def test_a_table_shows_what_is_not_known_as_a_dash() -> None:
    figures = ("goodput_stage", "attainment_stage", "mean_width")
    assert titles(figures).split() == ["goodput", "stage", "attained", "width"]
    assert cells({"goodput_stage": 12.3, "attainment_stage": 0.5, "mean_width": None}, figures, width=7) == (
        "     12  50.0%      -"
    )
