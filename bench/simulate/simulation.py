"""Serves a workload with the real scheduler under a virtual clock; steps take what a measured profile says.

As in the engine, a step is planned while the one before it is in flight, and steps run one after the other.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

import numpy as np

from bench.load.client_forks import parts_of
from bench.load.measures import Record, Run, Window
from bench.load.workload import ALONE, END, TPOT_SLO_MULTIPLE, TTFT_SLO, Fork, Item, Workload
from bench.simulate.profile import Profile
from bench.timing import no_collections
from scheduler.config import RESERVE, SchedulerConfig
from scheduler.controller import Controller, ControllerConfig
from scheduler.events import Finished, StageStarted, TokenEmitted
from scheduler.gate import RejectedError
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler
from scheduler.step import Entry, FinishedStep, Sample, ScheduledStep, StepResult
from scheduler.stopping import Stopping
from serve.door import Watcher
from serve.engine.step_log import Moments, record

MAX_CONTEXT = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every policy.

    seed     of the noise, and of where a log's steps begin
    reserve  the share of running requests' KV that a new one must leave to them, as a server's option has it
    fork     who divides answers into branches, and joins them
    limits   of branches that the server forks, in times the tokens that they have
    """

    profile: Profile
    workload: Workload
    slo: Slo
    window: Window = Window()  # noqa: RUF009 - frozen
    seed: int = 0
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    reserve: float = RESERVE
    fork: Fork = "server"
    limits: float = 1.0


# --- serving -----------------------------------------------------------------------------------------------


class NoText:
    """A codec for requests without text."""

    fresh = ""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return ""

    def reader(self, before: Iterable[int], *, special_tokens: bool) -> NoText:
        return self

    def push(self, token: int) -> str:
        return ""


@dataclass(slots=True)
class _Asked:
    """What a client asks for. `rounds`: what it sends at a time; `open`: how much of it has no answer."""

    index: int
    record: Record
    rounds: Iterator[Sequence[Request]]
    open: int = 0


def by_client(item: Item, index: int, slo: Slo) -> Iterator[list[Request]]:
    """The requests of a client that forks and joins by itself (bench.load.client_forks)."""
    parts = parts_of(item, index)
    wanted = next(parts)
    for stage in count():
        yield [
            Request(
                id=f"{index}.{stage}.{number}",
                prompt=part.prompt,
                program=Plan(stages=(SerialStage(stopping=Stopping(max_tokens=part.tokens)),)),
                slo=slo,
            )
            for number, part in enumerate(wanted)
        ]
        try:
            wanted = parts.send([(Simulation.TOKEN.token,) * part.tokens for part in wanted])
        except StopIteration:
            return


class Simulation:
    """One policy serving one workload: `serve`, then `run`.

    tokens, turns   emitted within the window, and how many pairs of a step and a request emitted any
    given, sent     tokens that were computed although nobody sampled them there (of prompts, of joined text),
                    and requests, for the answers that are measured
    held, most_held KV positions of live requests within the window: summed over its seconds, and at most
    """

    TOKEN, END = Sample(0), Sample(END)

    def __init__(
        self,
        setting: Setting,
        policy: str,
        *,
        latency: StepLatencyModel | None = None,
        controller: type[Controller] = Controller,
        scheduler: type[Scheduler] = Scheduler,
        watcher: Watcher | None = None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """`latency` is what the scheduler believes of steps, if not what the profile says. The watcher is
        told of every step, without the host's moments."""
        self._on_answer = on_answer
        profile = self.profile = setting.profile
        self._device = profile.latency()  # learns nothing: what steps really take
        self._quantiles = np.linspace(0.0, 1.0, len(profile.noise) or 1)
        self.setting, self.name, self._watcher = setting, policy, watcher
        buckets = profile.bucket_seconds
        self.scheduler = scheduler(
            SchedulerConfig(
                num_pages=profile.num_pages,
                page_size=profile.page_size,
                num_slots=2 * max(buckets),
                max_context=MAX_CONTEXT,
                max_queue=sys.maxsize,
                reserve=setting.reserve,
                prefix_cache=setting.fork == "client",  # else no prompt comes twice
            ),
            controller(latency or profile.latency(), policy, setting.controller),
            NoText(),
        )
        self.now = 0.0
        self.records: list[Record] = []  # in the order of the workload
        self.steps = 0
        self.tokens = self.turns = self.given = self.sent = 0
        self.held, self.most_held = 0.0, 0
        self._within: Counter[int] = Counter()  # by record: its tokens that came within the window
        self.error_sums = [0.0, 0.0]  # of (measured - predicted) / measured, signed and absolute
        self.planning = 0.0
        self.preemptions: list[int] = []
        self._noise = np.random.default_rng([setting.seed, 2])
        first = int(self._noise.integers(len(profile.excess))) if profile.excess else 0
        self._excess = cycle(profile.excess[first:] + profile.excess[:first])
        self._waiting = deque(enumerate(setting.workload.items))
        self._to_measure: set[int] = set()
        self._sampled: set[tuple[str, int]] = set()  # segments, by request, that have sampled tokens
        self._asked: dict[str, _Asked] = {}  # by the id of a request that is not answered
        self._left: dict[tuple[str, int], int] = {}  # tokens of branches that no limit ends, by request

    # --- the engine's loop -----------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve until every request of the window is answered."""
        flying: tuple[ScheduledStep, float, float] | None = None  # step, begin, end
        for _ in range(self.setting.workload.clients or 0):
            self._send_next(0.0)
        while True:
            self._send_due()
            if flying is None and self.scheduler.idle:
                if not self._waiting:
                    return
                self.now = max(self.now, self._waiting[0][1].arrival)
                continue
            scheduled = self._schedule()
            if scheduled is None and flying is None:
                raise RuntimeError("requests are live, but no step can advance any of them")
            launched = None
            if scheduled is not None:
                begin = max(self.now, flying[2] if flying else self.now)
                launched = (scheduled, begin, begin + self._duration(scheduled))
            if flying is not None:
                self._finish(*flying)
            flying = launched
            over = self.now - self.setting.window.end
            if over >= 0.0 and (not self._to_measure or over > self.setting.window.drain):
                return

    def _schedule(self) -> ScheduledStep | None:
        began = time.perf_counter()
        for request_id in self.scheduler.give_up_late(self.now):
            self._refused(request_id)
        scheduled = self.scheduler.schedule(self.now)
        self.planning += time.perf_counter() - began
        return scheduled

    def _duration(self, scheduled: ScheduledStep) -> float:
        seconds = self._device.predict(scheduled.forecast.load)
        seconds *= self.profile.factors.get(scheduled.step.bucket, 1.0)
        if self.profile.excess:
            seconds *= 1.0 + next(self._excess)
        elif self.profile.noise:
            seconds *= 1.0 + float(np.interp(self._noise.random(), self._quantiles, self.profile.noise))
        return seconds

    def _finish(self, scheduled: ScheduledStep, begin: float, end: float) -> None:
        self.now = end
        held = self.scheduler.pool.owned * self.profile.page_size
        sampling = Counter(entry.request_id for entry in scheduled.step.entries if entry.samples)
        samples = (self.TOKEN,) * sampling.total()
        if self._left:
            samples = tuple(map(self._sample, (entry for entry in scheduled.step.entries if entry.samples)))
        for entry in scheduled.step.entries:
            place = entry.request_id, entry.segment
            if entry.rows == 1 and place in self._sampled:
                continue  # it feeds what was sampled
            if entry.samples:
                self._sampled.add(place)
            if self._asked[entry.request_id].index in self._to_measure:
                self.given += entry.rows
        events = self.scheduler.update(StepResult(scheduled.step, samples, end - begin), end)
        self.steps += 1
        if self._watcher is not None:
            finished = FinishedStep(scheduled.step, scheduled.forecast, end - begin)
            self._watcher(record(finished, Moments(begin, begin, begin, end, end, end, 0.0, False, 0.0)))
        error = 1.0 - scheduled.forecast.seconds / (end - begin)
        self.error_sums[0] += error
        self.error_sums[1] += abs(error)
        if end in self.setting.window:
            self.turns += len(sampling)
            self.tokens += sampling.total()
            self.held += held * (end - begin)
            self.most_held = max(self.most_held, held)
        for event in events:
            if type(event) is TokenEmitted:
                asked = self._asked[event.request_id]
                asked.record.emit(end)
                self._within[asked.index] += end in self.setting.window
                if self._left:
                    self._left[event.request_id, event.branch] -= 1
            elif type(event) is StageStarted and self.setting.limits > 1.0:
                lengths = self._asked[event.request_id].record.item.stages[event.stage]
                begun = [(event.request_id, each.branch) for each in event.branches]
                self._left.update(zip(begun, lengths, strict=True))
            elif type(event) is Finished:
                self.preemptions.append(event.usage.preemptions)
                self._ended(event.request_id)

    def _sample(self, entry: Entry) -> Sample:
        return self.TOKEN if self._left.get((entry.request_id, entry.branch), 1) else self.END

    # --- the clients -----------------------------------------------------------------------------------

    def _send_due(self) -> None:
        while self.setting.workload.clients is None and self._waiting:
            if self._waiting[0][1].arrival > self.now:
                return
            self._send_next(self._waiting[0][1].arrival)

    def _send_next(self, now: float) -> None:
        if not self._waiting:
            return
        index, item = self._waiting.popleft()
        record, slo = Record(item, now), self.setting.slo
        self.records.append(record)
        if now in self.setting.window:
            self._to_measure.add(index)
        if self.setting.fork == "client":
            rounds = by_client(item, index, slo)
        else:
            rounds = iter([[item.request(str(index), slo, index, limits=self.setting.limits)]])
        self._go_on(_Asked(index, record, rounds), now)

    def _go_on(self, asked: _Asked, now: float) -> None:
        """Send what the client asks for next, if anything."""
        requests = next(asked.rounds, []) if asked.record.refused is None else []
        if not requests:
            self._answered(asked)
            return
        asked.open = len(requests)
        self.sent += len(requests) if asked.index in self._to_measure else 0
        for request in requests:
            self._asked[request.id] = asked
            try:
                self.scheduler.add(request, now)
            except RejectedError:
                self._refused(request.id)

    def _refused(self, request_id: str) -> None:
        self._asked[request_id].record.refused = self.now
        self._ended(request_id)

    def _ended(self, request_id: str) -> None:
        asked = self._asked.pop(request_id)
        asked.open -= 1
        if not asked.open:
            self._go_on(asked, self.now)

    def _answered(self, asked: _Asked) -> None:
        asked.record.finished = asked.record.refused is None
        self._to_measure.discard(asked.index)
        self._on_answer()
        if self.setting.workload.clients is not None:
            self._send_next(self.now)

    @property
    def measured(self) -> list[Record]:
        """Everything that arrived in the window."""
        return [record for record in self.records if record.arrival in self.setting.window]

    @property
    def seconds(self) -> float:
        """Of the window, or of all that was served if it has no end."""
        window = self.setting.window
        return (window.end if math.isfinite(window.end) else self.now) - window.warmup

    def run(self) -> Run:
        """What clients saw of the requests that arrived in the window, and what was served in it."""
        setting = self.setting
        return Run(
            policy=self.name,
            slo=setting.slo,
            seconds=self.seconds,
            records=self.measured,
            tokens=self.tokens,
            good_tokens=sum(
                tokens
                for index, tokens in self._within.items()
                if self.records[index].good(setting.slo, "stage")
            ),
            turns=self.turns,
        )

    def footprint(self) -> dict[str, float]:
        """What the measured answers took: of each, requests, and tokens that were read; and which
        share of the KV pool live requests held within the window, on average and at most. Preemptions are of
        all requests, those around the window included."""
        answers, pool = max(1, len(self.measured)), self.profile.num_pages * self.profile.page_size
        return {
            "requests": self.sent / answers,
            "given_tokens": self.given / answers,
            "kv_held": self.held / self.seconds / pool,
            "kv_most": self.most_held / pool,
            "preemptions": sum(self.preemptions),
        }


def unloaded_tpot(profile: Profile) -> float:
    """Seconds per token of one serial request that is served alone."""
    workload = Workload("alone", "poisson", 0, (ALONE,))
    slo = Slo(tpot=1.0, ttft=TTFT_SLO)
    alone = Simulation(Setting(profile=profile.exact(), workload=workload, slo=slo), "off")
    alone.serve()
    return alone.records[0].mean_tpot


def targets(profile: Profile, multiple: float = TPOT_SLO_MULTIPLE) -> Slo:
    """TPOT a multiple of what one request alone gets, and TTFT five seconds."""
    return Slo(tpot=multiple * unloaded_tpot(profile), ttft=TTFT_SLO)


def in_processes(count: int) -> ProcessPoolExecutor:
    """Processes that simulate, beside one another."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def simulate(setting: Setting, policy: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The policy's row, and what the simulation itself took: the latter is not deterministic."""
    simulation = Simulation(setting, policy)
    began = time.process_time()
    with no_collections():
        simulation.serve()
    steps = max(1, simulation.steps)
    cost = {
        "steps": simulation.steps,
        "simulated_s": simulation.now,
        "cpu_s": time.process_time() - began,
        "plan_ms": 1e3 * simulation.planning / steps,
        "bias": simulation.error_sums[0] / steps,
        "mape": simulation.error_sums[1] / steps,
        "preemptions": sum(simulation.preemptions),
        "given": simulation.given,
    }
    return simulation.run().row(), cost
