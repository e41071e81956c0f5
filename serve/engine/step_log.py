"""A file with a line for every step: what it held, what it was predicted to take, and what it took.

One JSON object a line, with the fields of `StepRecord`. Times are in seconds, `ended` by the monotonic clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from scheduler.predictor import StepLoad
from scheduler.step import FinishedStep


class StepRecord(NamedTuple):
    """A finished step.

    requests, branches    that it should give a token
    deferred              branches that could have advanced and did not
    predicted, baseline   seconds, by the predictor as it was when the step was planned
    budget                seconds that it was allowed; None where nothing limited it
    seconds               from the end of the step before it, or from its launch if that was later
    """

    ended: float
    bucket: int
    load: StepLoad
    requests: int
    branches: int
    deferred: int
    predicted: float
    baseline: float
    budget: float | None
    seconds: float

    @classmethod
    def of(cls, finished: FinishedStep, ended: float) -> StepRecord:
        step, forecast = finished.step, finished.forecast
        sampling = [entry.request_id for entry in step.entries if entry.samples]
        budget = forecast.budget_seconds
        return cls(
            ended,
            step.bucket,
            forecast.load,
            len(set(sampling)),
            len(sampling),
            len(forecast.deferred),
            forecast.seconds,
            forecast.baseline_seconds,
            budget if budget < float("inf") else None,
            finished.seconds,
        )


class StepLog:
    """Writes a file of steps; lines are whole when it is closed, or a few seconds after they are written."""

    FLUSH_SECONDS = 2.0

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file: TextIO = path.open("w")
        self._clock = clock
        self._flushed = clock()

    def observe_step(self, finished: FinishedStep) -> None:
        now = self._clock()
        step = StepRecord.of(finished, now)
        record = step._asdict() | {"load": step.load._asdict()}
        self._file.write(json.dumps(record) + "\n")
        if now - self._flushed > self.FLUSH_SECONDS:
            self._file.flush()
            self._flushed = now

    def close(self) -> None:
        self._file.close()


def read_steps(lines: Iterable[str]) -> Iterator[StepRecord]:
    """The steps of a log, as far as their lines are whole."""
    for line in lines:
        if line.endswith("\n"):
            record = json.loads(line)
            yield StepRecord(**record | {"load": StepLoad(**record["load"])})
