"""The engine: one thread that plans a step ahead of the device, and hands each request its events.

    plan k+1; publish k-1; wait for k; update k.    With nothing to plan, drain.

A second thread launches k+1 meanwhile, and has done so by the time that k ends, or the device waits for it.
That is why k-1 is published after k+1 is planned: readers can wait for a plan, and the device for nobody.

Requests come and go under a lock that is held while planning and updating, never while the device works:
what is cancelled is gone before the next plan is made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

import structlog

from model.settings import one_line, out_of_memory
from scheduler.events import Event, Finished, TokenEmitted
from scheduler.gate import RejectedError
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step import FinishedStep, ScheduledStep, StepResult
from serve.door import NO_PROGRAMS, Failed, Load, Programs, Refused, Sink, State, Watcher
from serve.engine.collector import Collector
from serve.engine.launcher import Launch, Launcher, StepRunner
from serve.engine.pauses import Pauses
from serve.engine.step_log import Moments, StepLog, record
from serve.logs.bugs import what
from serve.rate import TokenRate

log = structlog.get_logger("taper")


def why_failed(crash: BaseException) -> str:
    """What a step failed of, and what the operator can do, in a line."""
    if out_of_memory(crash):
        todo = "start again with fewer --num-pages or smaller --buckets"
        return f"a step found no memory: {todo} ({one_line(crash)})"
    return f"a step failed: {' '.join(what(crash).split())}"


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight, or about to be.

    planned  when its plan was made
    follows  that was while the step before it was in flight
    """

    scheduled: ScheduledStep
    launch: Future[Launch]
    planned: float
    follows: bool


@dataclass(frozen=True, slots=True)
class _Ended:
    """A step that nobody has been told of yet.

    news  each request's id, its sink as of the step's end, and its events
    """

    finished: FinishedStep
    moments: Moments
    news: list[tuple[str, Sink, list[Event]]]


class InProcessEngine:
    """Runs a scheduler's steps.

    `on_step` is told of every finished step and `watch` of its figures, both from the engine's thread;
    `step_log` gets a line of them, and is closed with the engine. `collector` takes over the garbage
    collection of the process. `before_plan` is called before each step is planned. `programs` counts those
    that the engine has got.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        on_step: Callable[[FinishedStep], None] | None = None,
        watch: Watcher | None = None,
        step_log: StepLog | None = None,
        collector: Collector | None = None,
        before_plan: Callable[[], None] = lambda: None,
        programs: Callable[[], Programs] = lambda: NO_PROGRAMS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.state: State = "STARTING"
        self.failure = ""
        self.runner = runner
        self._on_step = on_step
        self._watchers = [each for each in (watch, step_log and step_log.write) if each is not None]
        self._step_log = step_log
        self._clock = clock
        self._collector = collector
        self._before_plan = before_plan
        self._programs = programs
        self._sinks: dict[str, Sink] = {}
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="taper-engine", daemon=True)
        self._rate = TokenRate()
        self._steps = 0
        self._untold: _Ended | None = None

    # --- from any thread -------------------------------------------------------------------------------

    def start(self) -> None:
        """Take requests from now on."""
        if self._collector is not None:
            self._collector.start(self._clock())
        self.state = "SERVING"
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; `sink` gets its events, at most once per step, from the engine's thread.

        A refusal it gets here and now, and so a program that cannot run, as `Failed`.
        """
        with self._wake:
            not_taken = self._add(request)
            if not_taken is None:
                self._sinks[request.id] = sink
                self._wake.notify()
        if not_taken is not None:
            sink([not_taken])

    def _add(self, request: Request) -> Refused | Failed | None:
        """Queue a request; or why it is not taken."""
        if self.state == "STARTING":
            return Refused("STARTING", "the server is starting")
        if self.state != "SERVING":
            return Refused("DRAINING", "the server takes no new requests")
        if request.id in self._sinks:
            return Refused("DUPLICATE", f"request {request.id!r} is running")
        try:
            self.scheduler.add(request, self._clock())
        except RejectedError as rejected:
            return Refused(rejected.reason, str(rejected), rejected.retry_after)
        except ValueError as fault:
            return Failed(what(fault))
        return None

    def cancel(self, request_id: str) -> None:
        """Forget a request; its pages and slots are free at once."""
        with self._wake:
            self._sinks.pop(request_id, None)
            self.scheduler.cancel(request_id)
            self._wake.notify()

    def set_policy(self, policy: str) -> None:
        """Switch the admission policy from the next step on. Raises ValueError."""
        with self._wake:
            self.scheduler.controller.set_policy(policy)

    @property
    def policy(self) -> str:
        return self.scheduler.controller.policy.name

    def load(self) -> Load:
        with self._wake:
            return Load(
                scheduler=self.scheduler.load(),
                accuracy=self.scheduler.controller.latency.accuracy.snapshot(),
                output_tokens_per_second=self._rate.per_second(self._clock()),
                steps=self._steps,
                unloaded_step=self.scheduler.controller.latency.rows_seconds(1),
                start_gap=self.scheduler.start_gap,
                programs=self._programs(),
            )

    def stop(self, *, drain: bool, timeout: float) -> None:
        """Take no more requests; with `drain`, finish those that run, for up to `timeout` seconds."""
        with self._wake:
            if self.state == "SERVING":
                self.state = "DRAINING" if drain else "STOPPED"
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._wake:
            if self.state != "FAILED":
                self.state = "STOPPED"
            self._wake.notify()
        self.wait()

    def wait(self) -> None:
        """Until it has stopped, or failed, and everybody has been told."""
        if self._thread.is_alive():
            self._thread.join()

    # --- the loop --------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = "the server stopped before the request finished"
        launcher = Launcher(self.runner, self._clock)
        try:
            with closing(Pauses()) as pauses:
                self._loop(launcher, pauses)
        except BaseException as crash:  # SystemExit, too: nobody runs the requests from here on
            error = self.failure = why_failed(crash)
            self.state = "FAILED"
            if not out_of_memory(crash):
                log.exception("the engine failed")
        finally:
            self._tell()
            with self._wake:
                sinks = [*self._sinks.values()]
                self._sinks.clear()
            for sink in sinks:
                sink([Failed(error)])
            launcher.close()
            if self._step_log is not None:
                self._step_log.close()

    def _loop(self, launcher: Launcher, pauses: Pauses) -> None:
        flying: _Launched | None = None
        ended = self._clock()
        while flying is not None or self._has_work():
            self._before_plan()
            with self._wake:
                late = [self._sinks.pop(name) for name in self.scheduler.give_up_late(self._clock())]
                over = self.state == "STOPPED" or self.scheduler.idle
                next_step = None if over else self.scheduler.schedule(self._clock())
            launched = self._launch(launcher, next_step, flying is not None) if next_step else None
            for sink in late:
                sink([Refused("SLO_UNATTAINABLE", "it has waited, and its first token would be late")])
            self._tell()
            if flying is not None:
                ended = self._finish(flying, ended, pauses)
            elif launched is None and not over:
                raise RuntimeError("requests are live, but no step can advance any of them")
            flying = launched
            if flying is None:
                self._tell()

    def _has_work(self) -> bool:
        """Wait for requests; False once the engine has stopped."""
        with self._wake:
            while self.scheduler.idle and self.state == "SERVING":
                if self._collector is not None:
                    self._collector.idle(self._clock())
                self._wake.wait()
            return self.state != "STOPPED" and not self.scheduler.idle

    def _launch(self, launcher: Launcher, scheduled: ScheduledStep, follows: bool) -> _Launched:
        planned = self._clock()
        return _Launched(scheduled, launcher.launch(scheduled.step), planned, follows)

    def _finish(self, launched: _Launched, previous_end: float, pauses: Pauses) -> float:
        """Wait for a step and learn from it; returns when it ended.

        Steps run one after the other: a step's time counts from the end of the one before it.
        """
        scheduled, follows = launched.scheduled, launched.follows
        looked, launch = self._clock(), launched.launch.result()
        ready = launch.launched <= looked and launch.handle.is_ready()
        samples = launch.handle.samples()
        now, paused = self._clock(), pauses.take()
        seconds = now - (previous_end if follows else launch.launched)
        with self._wake:
            events = self.scheduler.update(StepResult(scheduled.step, samples, seconds), now)
            self._steps += 1
            self._rate.add(now, sum(isinstance(event, TokenEmitted) for event in events))
            news = self._addressed(events)
        moments = Moments(
            planned=launched.planned,
            launching=launch.launching,
            launched=launch.launched,
            looked=looked,
            ended=now,
            published=now,
            idle=max(0.0, launch.launched - previous_end) if follows else 0.0,
            ready=ready,
            paused=min(max(paused, launch.paused), seconds),
        )
        self._untold = _Ended(FinishedStep(scheduled.step, scheduled.forecast, seconds), moments, news)
        return now

    def _addressed(self, events: Iterable[Event]) -> list[tuple[str, Sink, list[Event]]]:
        batches: dict[str, list[Event]] = {}
        for event in events:
            batches.setdefault(event.request_id, []).append(event)
        return [(key, self._sinks[key], batch) for key, batch in batches.items() if key in self._sinks]

    def _tell(self) -> None:
        """Publish what the last step brought, if nobody has been told yet, and report the step."""
        ended, self._untold = self._untold, None
        if ended is None:
            return
        for sink, batch in self._delivered(ended.news):
            sink(batch)
        self._report(ended.finished, ended.moments._replace(published=self._clock()))
        if self._collector is not None:
            self._collector.busy(ended.moments.ended)

    def _delivered(self, news: Iterable[tuple[str, Sink, list[Event]]]) -> list[tuple[Sink, list[Event]]]:
        """What is for requests that were not cancelled meanwhile. Those that have finished are forgotten."""
        delivered: list[tuple[Sink, list[Event]]] = []
        with self._wake:
            for key, sink, batch in news:
                if self._sinks.get(key) is sink:
                    delivered.append((sink, batch))
                    if isinstance(batch[-1], Finished):
                        del self._sinks[key]
        return delivered

    def _report(self, finished: FinishedStep, moments: Moments) -> None:
        if self._on_step is not None:
            self._on_step(finished)
        if self._watchers:
            figures = record(finished, moments)
            for watch in self._watchers:
                watch(figures)
