"""A device and a host in made-up time, which does not depend on how threads take turns.

Each thread has a time of its own. Who waits for another goes on at the later of the two times: the launch of
a step begins when its plan is made, a step when its launch has returned, and its result is seen when it ends.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from scheduler.scheduler import Scheduler
from scheduler.step import Sample, ScheduledStep, Step, StepResult


class Timed:
    """Takes `step` seconds for each step, one after the other. Its host takes `launch` to launch one,
    and `work` to learn from one.

    Any thread but the launching one has the host's time, `now`; `clock` is for the engine.
    """

    def __init__(self, *, step: float = 0.010, launch: float = 0.001, work: float = 0.0) -> None:
        self.step, self.launching, self.work = step, launch, work
        self.now = 0.0
        self._launcher: int | None = None
        self._launched = 0.0  # the launching thread's time
        self._free = 0.0  # when the device has done all that was launched
        self._planned: dict[int, float] = {}

    def clock(self) -> float:
        return self._launched if threading.get_ident() == self._launcher else self.now

    def watch(self, scheduler: Scheduler) -> Scheduler:
        """Note when its plans are made, and let its updates take their time."""
        schedule, update = scheduler.schedule, scheduler.update

        def scheduled(now: float) -> ScheduledStep | None:
            plan = schedule(now)
            if plan is not None:
                self._planned[plan.step.step_id] = self.now
            return plan

        def updated(result: StepResult, now: float) -> Any:
            self.now += self.work
            return update(result, now)

        scheduler.schedule, scheduler.update = scheduled, updated  # type: ignore[method-assign]
        return scheduler

    def launch(self, step: Step) -> Timed.Launched:
        self._launcher = threading.get_ident()
        self._launched = max(self._launched, self._planned[step.step_id]) + self.launching
        self._free = max(self._free, self._launched) + self.step
        return Timed.Launched(self, step, self._free)

    @dataclass
    class Launched:
        timed: Timed
        step: Step
        end: float

        def is_ready(self) -> bool:
            return self.timed.now >= self.end

        def samples(self) -> tuple[Sample, ...]:
            self.timed.now = max(self.timed.now, self.end)
            return tuple(Sample(65) for entry in self.step.entries if entry.samples)
