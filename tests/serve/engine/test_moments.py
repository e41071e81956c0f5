"""When the host did what for a step: its record says so, and how long its threads take together."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest

from scheduler.step import FinishedStep
from serve.door import StepRecord
from serve.engine.engine import InProcessEngine
from serve.engine.pauses import Pauses
from serve.engine.step_log import StepLog, read_steps
from tests.serve.engine.instant import scheduler, serve_one
from tests.serve.engine.timed import Timed


def test_a_steps_time_counts_from_the_end_of_the_one_before_it(tmp_path: Path) -> None:
    """Each is launched while the one before it runs: from its launch to its end would be too long."""
    timed, finished, records = Timed(), list[FinishedStep](), list[StepRecord]()
    engine = InProcessEngine(
        timed.watch(scheduler()),
        timed,
        on_step=finished.append,
        watch=records.append,
        step_log=StepLog(tmp_path / "steps"),
        clock=timed.clock,
    )
    serve_one(engine, 8)
    assert [step.seconds for step in finished] == pytest.approx([timed.step] * len(finished))
    assert len(finished) >= 8
    assert [step.step.step_id for step in finished] == [*range(len(finished))]
    ends = [timed.launching + timed.step * (1 + number) for number in range(len(records))]
    assert [record.ended for record in records] == pytest.approx(ends)
    assert [record.seconds for record in records] == [step.seconds for step in finished]
    lines = (tmp_path / "steps").read_text().splitlines(keepends=True)
    assert len([*read_steps(lines)]) == len(records), "the log is whole when the engine has stopped"


def steps_of(timed: Timed, tokens: int = 30) -> list[StepRecord]:
    """The steps of a request that is served alone, by a host and a device that take such times."""
    records = list[StepRecord]()
    engine = InProcessEngine(timed.watch(scheduler()), timed, watch=records.append, clock=timed.clock)
    serve_one(engine, tokens)
    return records


@pytest.mark.parametrize(("launch", "work", "period"), [(8, 4, 11), (10, 0, 10), (9.9, 0.1, 10), (25, 4, 25)])
def test_what_the_hosts_threads_do_takes_less_than_the_sum(launch: float, work: float, period: float) -> None:
    """In milliseconds, where a step takes 10. With one thread the first would take 12, and the last 29: what
    remains is that the step after the next is planned, and so launched, only once a step has ended."""
    records = steps_of(Timed(step=0.010, launch=launch / 1e3, work=work / 1e3))
    ends = [record.ended for record in records]
    two = [after - before for before, after in zip(ends[3:-3], ends[5:-1], strict=True)]
    assert two == pytest.approx([2 * period / 1e3] * len(two), rel=1e-6)
    assert len(two) > 20
    assert [record.seconds for record in records[1:]] == pytest.approx(
        [after - before for before, after in pairwise(ends)]
    )


def test_a_record_says_when_the_host_did_what() -> None:
    records = steps_of(Timed(step=0.010, launch=0.003, work=0.002))
    first, second, third = records[:3]
    assert (first.planned, first.launched, first.ended) == pytest.approx((0.0, 0.003, 0.013))
    assert (second.planned, second.launched, second.ended) == pytest.approx((0.0, 0.006, 0.023))
    assert (third.planned, third.launched, third.ended) == pytest.approx((0.015, 0.018, 0.033))
    assert [record.looked for record in records[:3]] == pytest.approx([0.0, 0.015, 0.025])
    assert [record.published - record.ended for record in records] == pytest.approx([0.002] * len(records))
    assert all(before.published >= after.planned for before, after in pairwise(records[:-1]))
    assert not any(record.idle or record.ready for record in records)


def test_a_step_whose_launch_was_not_ready_in_time_says_for_how_long_the_device_waited() -> None:
    records = steps_of(Timed(step=0.010, launch=0.012))
    later = records[2:]
    assert [record.idle for record in later] == pytest.approx([0.002] * len(later))
    assert [record.seconds for record in later] == pytest.approx([0.012] * len(later))
    assert records[0].idle == 0.0, "nothing was in flight"


def test_a_step_that_had_ended_before_the_engine_looked_says_so() -> None:
    records = steps_of(Timed(step=0.010, launch=0.001, work=0.015))
    assert [record.ready for record in records[1:-1]] == [True] * (len(records) - 2)


def test_a_result_that_came_while_the_engine_waited_for_the_launch_was_not_there_when_it_looked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Timed.Launched, "is_ready", lambda _: True)
    records = steps_of(Timed(step=0.010, launch=0.012))
    assert not any(record.ready for record in records)


@pytest.mark.parametrize(
    ("engine", "launcher", "step", "paused"),
    [
        (0.125, 0.25, 1.0, 0.25),
        (0.25, 0.125, 1.0, 0.25),
        (0.125, 0.25, 0.010, 0.010),
    ],
)
def test_a_step_was_paused_for_as_long_as_either_thread_and_no_longer_than_it_took(
    monkeypatch: pytest.MonkeyPatch, engine: float, launcher: float, step: float, paused: float
) -> None:
    def take(_: Pauses) -> float:
        return {"taper-engine": engine, "taper-launch": launcher}[threading.current_thread().name]

    monkeypatch.setattr(Pauses, "take", take)
    records = steps_of(Timed(step=step), tokens=5)
    assert [record.paused for record in records] == pytest.approx([paused] * len(records))
