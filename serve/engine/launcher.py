"""Launches steps in a thread of its own.

The call of a compiled program takes the host several milliseconds, mostly without the interpreter's lock.
Meanwhile the engine waits for the step before, hands out its events and plans the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from scheduler.step import Sample, Step
from serve.engine.pauses import Pauses


class Handle(Protocol):
    def is_ready(self) -> bool: ...
    def samples(self) -> tuple[Sample, ...]: ...


class StepRunner(Protocol):
    """What launches steps."""

    def launch(self, step: Step) -> Handle: ...


class Launch(NamedTuple):
    """A launched step: when its launch was called and returned.

    paused  seconds in which the thread could have run and did not, since the launch before it
    """

    handle: Handle
    launching: float
    launched: float
    paused: float


class Launcher:
    """Owns a runner while it is open: steps are launched in order, and none after one that failed."""

    CLOSE_SECONDS = 5.0

    def __init__(self, runner: StepRunner, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._clock = clock
        self._waiting: SimpleQueue[tuple[Step, Future[Launch]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="taper-launch", daemon=True)
        self._thread.start()

    def launch(self, step: Step) -> Future[Launch]:
        """Launch a step once those before it are launched. The future raises what the runner raised."""
        launch: Future[Launch] = Future()
        self._waiting.put((step, launch))
        return launch

    def close(self) -> None:
        """End the thread, after what is being launched, or without it where that does not come to an end."""
        self._waiting.put(None)
        self._thread.join(self.CLOSE_SECONDS)

    def _run(self) -> None:
        failure: BaseException | None = None
        with closing(Pauses()) as pauses:
            while (waiting := self._waiting.get()) is not None:
                step, launch = waiting
                try:
                    if failure is not None:
                        raise failure
                    launch.set_result(self._launch(step, pauses))
                except BaseException as error:
                    failure = error
                    launch.set_exception(error)

    def _launch(self, step: Step, pauses: Pauses) -> Launch:
        launching = self._clock()
        handle = self._runner.launch(step)
        return Launch(handle, launching, self._clock(), pauses.take())
