"""A file with a line for every step: what it held, what it was predicted to take, what it took, and when the
host did its part of it.

One JSON object a line, with the fields of `StepRecord` but `widths`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import structlog

from scheduler.predictor import StepLoad
from scheduler.step import FinishedStep
from serve.door import StepRecord

log = structlog.get_logger("taper")


class Moments(NamedTuple):
    """When the host did what for a step: fields of `StepRecord`."""

    planned: float
    launching: float
    launched: float
    looked: float
    ended: float
    published: float
    idle: float
    ready: bool
    paused: float


def record(finished: FinishedStep, moments: Moments) -> StepRecord:
    """The figures of a step."""
    step, forecast = finished.step, finished.forecast
    widths = tuple(Counter([entry.request_id for entry in step.entries if entry.samples]).values())
    return StepRecord(
        bucket=step.bucket,
        load=forecast.load,
        requests=len(widths),
        branches=sum(widths),
        deferred=len(forecast.deferred),
        predicted=forecast.seconds,
        baseline=forecast.baseline_seconds,
        budget=forecast.budget_seconds if math.isfinite(forecast.budget_seconds) else None,
        seconds=finished.seconds,
        widths=widths,
        **moments._asdict(),
    )


class StepLog:
    """Writes a file of steps; lines are whole when it is closed, or a few seconds after they are written.

    Making one raises OSError; a file that takes no more later, as on a full disk, is given up with a warning.
    """

    FLUSH_SECONDS = 2.0

    def __init__(self, path: Path) -> None:
        self._file: TextIO | None = path.open("w")
        self._flushed = -math.inf  # by the clock of the records

    def write(self, record: StepRecord) -> None:
        if self._file is None:
            return
        line = record._asdict() | {"load": record.load._asdict()}
        del line["widths"]
        try:
            self._file.write(json.dumps(line) + "\n")
            if record.ended - self._flushed > self.FLUSH_SECONDS:
                self._file.flush()
                self._flushed = record.ended
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """The server serves on without it."""
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = None
        log.warning("the step log is given up", error=str(error))


def read_steps(lines: Iterable[str]) -> Iterator[StepRecord]:
    """The steps of a log, as far as their lines are whole."""
    for line in lines:
        if line.endswith("\n"):
            fields = json.loads(line)
            yield StepRecord(**fields | {"load": StepLoad(**fields["load"])})
