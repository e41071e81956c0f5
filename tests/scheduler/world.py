"""A scheduler in front of a symbolic device, with the engine's loop and a clock that only steps move.

Every step is checked: pages and slots are accounted for, the plan costs what it says, no branch is passed
over for too long, nothing of a shared page is overwritten, and what is read was written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller, ControllerConfig
from scheduler.events import Event, Finished, Joined, StageFinished, StageStarted, TokenEmitted
from scheduler.footprint import worst_case_pages
from scheduler.predictor import StepLatencyModel
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step import Entry, Forecast, Sample, ScheduledStep, Step, StepResult
from scheduler.stopping import FinishReason
from tests.scheduler.alphabet import Alphabet
from tests.scheduler.interpreter import Answer, Interpreter, Key, Record
from tests.scheduler.symbolic import SymbolicDevice, SymbolicModel, unique_kv_tokens, widths

MAX_CONTEXT = 200
UNFILLED = ControllerConfig(rho=0.8, repay=0.0, fill=False)  # by the budget alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a load is served. None of it may change what a request says.

    in_flight    steps that are in flight while the next is planned: 0 or 1
    arrive_after a request arrives so many steps after the one before it
    late_by      a step takes so much longer than predicted (a factor)
    """

    policy: str = "taper"
    buckets: tuple[int, ...] = (4, 8, 16, 32)
    max_chunk: int = 16
    prompt_floor: int = 4
    num_pages: int = 250
    page_size: int = 4
    spare_slots: int = 0
    prefix_cache: bool = True
    controller: ControllerConfig = ControllerConfig()  # noqa: RUF009 - frozen
    reserve: float = 0.0  # so that some requests are preempted
    in_flight: int = 1
    arrive_after: int = 0
    late_by: float = 1.0
    max_context: int = MAX_CONTEXT
    max_queue: int = 1024
    max_client_queue: float = math.inf
    max_client_running: float = math.inf
    max_client_kv: float = math.inf


def latency(buckets: Sequence[int]) -> StepLatencyModel:
    return StepLatencyModel({rows: 1e-3 + 1e-4 * rows for rows in buckets}, 2e-6)


class World:
    """`add`, `step` until `scheduler.idle`, and read `events`."""

    def __init__(self, setting: Setting, model: SymbolicModel) -> None:
        self.setting = setting
        self.latency = latency(setting.buckets)
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=setting.num_pages,
                page_size=setting.page_size,
                num_slots=2 * max(setting.buckets) + setting.spare_slots,
                max_context=setting.max_context,
                max_queue=setting.max_queue,
                max_client_queue=setting.max_client_queue,
                max_client_running=setting.max_client_running,
                max_client_kv=setting.max_client_kv,
                prefix_cache=setting.prefix_cache,
                reserve=setting.reserve,
            ),
            Controller(
                self.latency,
                setting.policy,
                replace(setting.controller, max_chunk=setting.max_chunk, prompt_floor=setting.prompt_floor),
            ),
            Alphabet(),
        )
        self.pool = self.scheduler.pool
        self.device = SymbolicDevice(
            setting.num_pages, setting.page_size, self.scheduler.config.num_slots, model, self._is_shared
        )
        self.now = 0.0
        self.steps: list[Step] = []
        self.forecasts: list[Forecast] = []
        self.events: dict[str, list[Event]] = defaultdict(list)
        self.drawn: dict[int, tuple[Sample, Entry]] = {}  # by the sample's identity, where it was drawn
        self.computed: Counter[tuple[str, int, int, int]] = Counter()  # request, segment, index, token
        self.tails_dropped = 0
        self._forgotten: frozenset[int] = frozenset()
        self._flying: deque[tuple[ScheduledStep, tuple[Sample, ...], float]] = deque()
        self._passed_over: dict[tuple[str, int], tuple[int, int]] = {}

    # --- driving ---------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.scheduler.add(request, self.now)

    def cancel(self, request_id: str) -> bool:
        known = self.scheduler.cancel(request_id)
        self.check()
        return known

    def step(self) -> None:
        """One round of the engine's loop: schedule, launch, and take in the oldest step in flight."""
        scheduled = self.launch()
        if self._flying and (scheduled is None or len(self._flying) > self.setting.in_flight):
            self.land()

    def launch(self) -> ScheduledStep | None:
        oldest, tails = self._oldest(), self._tails()
        scheduled = self.scheduler.schedule(self.now)
        self.tails_dropped += len(tails - self._tails())
        assert self._oldest() <= oldest, "the oldest request was preempted"
        self.check()
        if scheduled is None:
            assert self._flying or self.scheduler.idle, "stuck: nothing can advance"
            return None
        step = scheduled.step
        self.steps.append(step)
        self.forecasts.append(scheduled.forecast)
        self._check_step(scheduled)
        self._check_turns(scheduled)
        samples = self.device.execute(step)
        self.computed.update(
            (entry.request_id, entry.segment, entry.ordinal + row, token)
            for entry, tokens in zip(step.entries, self.device.fed, strict=True)
            for row, token in enumerate(tokens)
        )
        sampling = [entry for entry in step.entries if entry.samples]
        self.drawn.update(
            (id(sample), (sample, entry)) for sample, entry in zip(samples, sampling, strict=True)
        )
        begins = max([self.now, *(end for _, _, end in self._flying)])
        ends = begins + scheduled.forecast.seconds * self.setting.late_by
        self._flying.append((scheduled, samples, ends))
        return scheduled

    @property
    def flying(self) -> list[ScheduledStep]:
        """The steps in flight, oldest first."""
        return [scheduled for scheduled, _, _ in self._flying]

    def land(self) -> list[Event]:
        """The oldest step in flight ends."""
        scheduled, samples, end = self._flying.popleft()
        seconds, self.now = max(1e-9, end - self.now), max(self.now, end)
        events = self.scheduler.update(StepResult(scheduled.step, samples, seconds), self.now)
        for event in events:
            self.events[event.request_id].append(event)
        self.check()
        return events

    def run_until(self, reached: Callable[[], bool], most: int = 300) -> None:
        """Serve what has been added until `reached` says so."""
        for _ in range(most):
            if reached():
                return
            self.step()
        raise AssertionError("never reached")

    def run(self, requests: Iterable[Request], max_steps: int = 5000) -> None:
        """Serve all of `requests`."""
        arriving = deque(requests)
        for number in range(max_steps):
            if arriving and (not self.setting.arrive_after or number % self.setting.arrive_after == 0):
                self.add(arriving.popleft())
                while arriving and not self.setting.arrive_after:
                    self.add(arriving.popleft())
            if not arriving and self.scheduler.idle:
                return self.check_drained()
            self.step()
        raise AssertionError(f"still running after {max_steps} steps")

    # --- checking --------------------------------------------------------------------------------------

    def check(self) -> None:
        self.scheduler.check()
        free = self.pool.free
        self.device.forget(free - self._forgotten)
        self._forgotten = free

    def check_drained(self) -> None:
        assert self.pool.owned == 0
        assert self.scheduler.free_slots == self.scheduler.config.num_slots

    def _is_shared(self, page: int) -> bool:
        return self.pool.owners(page) > 1 or page in self.pool.cache

    def _tails(self) -> set[tuple[str, int]]:
        """Segments of running requests that hold pages; not those of requests preempted as a whole."""
        running = self.scheduler.running
        return {(live.request.id, s.id) for live in running for s in live.segments.values() if s.pages}

    def _oldest(self) -> float:
        """Age of the oldest running request: its number in the order of starting."""
        return min((live.age for live in self.scheduler.running), default=math.inf)

    def _check_step(self, scheduled: ScheduledStep) -> None:
        setting, step, forecast = self.setting, scheduled.step, scheduled.forecast
        rows = sum(entry.rows for entry in step.entries)
        bucket = min(bucket for bucket in setting.buckets if bucket >= rows)
        kv_tokens = unique_kv_tokens(step.entries, setting.page_size)
        assert (step.rows, step.bucket, forecast.load.kv_tokens) == (rows, bucket, kv_tokens)
        seconds = self.latency.rows_seconds(bucket) + self.latency.scale * 2e-6 * kv_tokens
        assert abs(forecast.seconds - seconds) < 1e-12
        assert forecast.seconds >= forecast.baseline_seconds
        if self.scheduler.controller.policy.name.startswith("taper"):
            assert forecast.seconds <= max(forecast.budget_seconds, forecast.baseline_seconds) + 1e-12
        cap = {"off": 1, "cap:2": 2, "cap:3": 3}.get(self.scheduler.controller.policy.name)
        assert cap is None or max(widths(step).values()) <= cap

    def _check_turns(self, scheduled: ScheduledStep) -> None:
        """A ready branch, one of W of its request, advances once in W steps in which the request advances."""
        width = widths(scheduled.step)
        deferred: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for request_id, branch in scheduled.forecast.deferred:
            deferred[request_id].add((request_id, branch))
        passed_over: dict[tuple[str, int], tuple[int, int]] = {}
        for request_id, waiting in deferred.items():
            group = self.scheduler.live[request_id].width
            for key in waiting:
                times, largest = self._passed_over.get(key, (0, 0))
                times, largest = times + bool(width[request_id]), max(largest, group)
                assert times < largest, f"{key} was passed over {times} times in a group of {largest}"
                passed_over[key] = (times, largest)
        self._passed_over = passed_over

    # --- reading ---------------------------------------------------------------------------------------

    def answer(self, request_id: str) -> Answer:
        """The events of a request in the form of the interpreter's answer."""
        keys: dict[int, Key] = {0: ()}
        forks: dict[int, int] = defaultdict(int)
        answer: Answer = {(): []}
        for event in self.events[request_id]:
            match event:
                case StageStarted(branches=infos):
                    born = [info for info in infos if info.branch not in keys]
                    for number, info in enumerate(born):
                        keys[info.branch] = (*keys[info.parent], (forks[info.parent], number))
                        answer[keys[info.branch]] = []
                    for parent in {info.parent for info in born}:
                        forks[parent] += 1
                    for info in infos:
                        answer[keys[info.branch]].append(("stage", info.prefix))
                case TokenEmitted(branch=branch, sample=sample):
                    entry = self.drawn[id(sample)][1]
                    position = entry.start + entry.rows
                    answer[keys[branch]].append(("token", sample.token, position, entry.path))
                case StageFinished():
                    record = (event.reason, event.stop, event.completion_tokens, event.final)
                    answer[keys[event.branch]].append(("end", *record))
                case Joined(branches=branches):
                    joined = tuple(keys[branch] for branch in branches)
                    answer[joined[0][:-1]].append(("joined", joined))
                case _:
                    pass
        return answer

    def recomputed(self) -> int:
        """How often the KV of a token was computed again where it stands; not what a dropped one cost."""
        return self.computed.total() - len(self.computed)

    @property
    def running(self) -> list[str]:
        """The requests that run, the oldest first."""
        return [live.request.id for live in self.scheduler.running]

    def emitted(self, request_id: str) -> int:
        """Tokens of the request so far."""
        return sum(isinstance(event, TokenEmitted) for event in self.events[request_id])

    def holds_anything(self, request_id: str) -> bool:
        return request_id in self.scheduler.live

    def is_finished(self, request_id: str) -> bool:
        return bool(self.events[request_id]) and isinstance(self.events[request_id][-1], Finished)

    def finished(self, request_id: str) -> Finished:
        event = self.events[request_id][-1]
        assert isinstance(event, Finished)
        return event


def roomy(requests: Iterable[Request], setting: Setting) -> Setting:
    """With so many pages that all of `requests` fit at once."""
    needed = [worst_case_pages(r, setting.page_size, setting.max_context) for r in requests]
    return replace(setting, num_pages=max(setting.num_pages, sum(needed)))


def serve(requests: Sequence[Request], setting: Setting, model: SymbolicModel) -> World:
    world = World(setting, model)
    world.run(requests)
    return world


def assert_says(world: World, requests: Iterable[Request], model: SymbolicModel) -> None:
    """Every request says what its program, interpreted alone, says.

    Those that lose a race say the beginning of it, and then that they were outrun.
    """
    for request in requests:
        oracle = Interpreter(request, model, world.setting.max_context)
        meant, answer = oracle.run(), world.answer(request.id)
        lost = {key for key in meant if any(key[: len(loser)] == loser for loser in oracle.losers)}
        assert without_losers(answer) == {key: meant[key] for key in meant if key not in lost}
        for key in answer.keys() & lost:
            assert_begins(answer[key], meant[key])
        usage = world.finished(request.id).usage
        assert usage.completion_tokens == world.emitted(request.id) <= oracle.tokens
        assert lost or usage.completion_tokens == oracle.tokens
        assert usage.critical_path_tokens == oracle.critical
        assert usage.prompt_tokens == len(request.prompt)


def without_losers(answer: Answer) -> Answer:
    """What the branches say that win their races, and those without one: no schedule may change that."""
    lost = [key for key, records in answer.items() if is_outrun(records)]
    return {
        key: records
        for key, records in answer.items()
        if not any(key[: len(loser)] == loser for loser in lost)
    }


def is_outrun(records: Sequence[Record]) -> bool:
    return records[-1][:2] == ("end", FinishReason.OUTRUN)


def assert_begins(said: list[Record], meant: list[Record]) -> None:
    """`said` is the beginning of `meant`, and ends once, as it is meant to or because it was outrun."""
    kept = said[:-1] if is_outrun(said) else said
    assert kept == meant[: len(kept)]
    assert [record[-1] for record in said if record[0] == "end"].count(True) == 1
    assert said[-1][-1] is True
    tokens = sum(record[0] == "token" for record in said)
    assert said[-1][-2] == tokens
