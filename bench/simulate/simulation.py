"""Serves a workload with the real scheduler under a virtual clock; steps take what a measured profile says.

    python -m bench.simulate --profile h200-qwen3-32b --workload headline \\
        --policies off,cap:2,cap:4,cap:6,cap:8,eager,taper --json -

As in the engine, a step is planned while the one before it is in flight, and steps run one after the other.
Requests that arrive within the window are measured, all of them, and served to their end; those before it
warm the server up, those after it keep up the load. Targets follow by rule: TTFT 5 s; TPOT twice what one
request alone gets under the same profile. Measures are those of bench.load.measures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from bench.load.measures import Record, client_row
from bench.load.workload import Item, Workload, named
from bench.result import write
from scheduler.events import Finished, TokenEmitted
from scheduler.predictor import Costs, StepLatencyModel
from scheduler.request import Slo
from scheduler.scheduler import Scheduler, SchedulerConfig
from scheduler.slack import ControllerConfig
from scheduler.step import Sample, ScheduledStep, StepResult
from serve.engine.calibration import load_profile

TTFT_SLO = 5.0
TPOT_SLO_MULTIPLE = 2.0
ALONE = Item(0.0, 800, ((400,),))
MAX_CONTEXT = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What steps take on a device with a model, in seconds.

    T = form(load) * factor[bucket] * (1 + noise)

    forms    predictors as they were fitted to single steps (bench.device.calibrate); time is the staircase's
    factors  by bucket: how much longer such a step takes while the server is loaded (bench.device.predictor)
    noise    evenly spaced quantiles of what is left, relative to the step; none: steps are exact
    """

    name: str
    forms: Mapping[str, Any]
    num_pages: int
    page_size: int
    factors: Mapping[int, float] = field(default_factory=dict)
    noise: tuple[float, ...] = ()

    @classmethod
    def load(cls, name: str) -> Profile:
        """The profile at the path `name`, or the one shipped under that name. Raises ValueError, OSError."""
        record = load_profile(name)
        serving = record.get("serving", {})
        return cls(
            name=record["name"],
            forms=record["forms"],
            num_pages=record["num_pages"],
            page_size=record["page_size"],
            factors={int(bucket): factor for bucket, factor in serving.get("factors", {}).items()},
            noise=tuple(serving.get("noise", ())),
        )

    @property
    def bucket_seconds(self) -> dict[int, float]:
        return {int(rows): seconds for rows, seconds in self.forms["staircase"]["buckets"].items()}

    @property
    def costs(self) -> Costs:
        return Costs(**self.forms["staircase"]["costs"])

    def latency(self, form: str = "staircase") -> StepLatencyModel:
        """A predictor as a server starts with it."""
        return StepLatencyModel.from_profile({"forms": self.forms}, form=form)

    def exact(self) -> Profile:
        """The same without noise."""
        return replace(self, noise=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every policy. Times in seconds; requests that arrive in [warmup, end) count.

    drain  seconds after the end of the window after which a request counts as not finished
    """

    profile: Profile
    workload: Workload
    tpot_slo: float
    ttft_slo: float = TTFT_SLO
    warmup: float = 0.0
    end: float = math.inf
    drain: float = math.inf
    seed: int = 0
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    max_chunk: int = 512
    prompt_floor: int = 32


# --- serving -----------------------------------------------------------------------------------------------


class Bytes:
    """A codec for requests without text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return ""


class Simulation:
    """One policy serving one workload: `run`, then read `records`.

    widths  branches that were given a token, summed over steps and requests with any; and these pairs' number
    tokens  emitted within the window
    """

    TOKEN = Sample(0)

    def __init__(
        self,
        setting: Setting,
        policy: str,
        *,
        latency: StepLatencyModel | None = None,
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        """`latency` is what the scheduler believes of steps, if not what the profile says."""
        profile = self.profile = setting.profile
        self._device = profile.latency()  # learns nothing: what steps really take
        self._quantiles = np.linspace(0.0, 1.0, len(profile.noise) or 1)
        self.setting = setting
        buckets = profile.bucket_seconds
        self.scheduler = scheduler(
            SchedulerConfig(
                num_pages=profile.num_pages,
                page_size=profile.page_size,
                num_slots=2 * max(buckets),
                max_context=MAX_CONTEXT,
                max_queue=len(setting.workload.items) + 1,
                max_chunk=setting.max_chunk,
                prompt_floor=setting.prompt_floor,
                controller=setting.controller,
                prefix_cache=False,  # prompts are random
                policy=policy,
            ),
            latency or profile.latency(),
            Bytes(),
        )
        self.now = 0.0
        self.records: dict[str, Record] = {}
        self.steps = 0
        self.tokens = 0
        self.widths = [0, 0]
        self.error_sums = [0.0, 0.0]  # of (measured - predicted) / measured, signed and absolute
        self.planning = 0.0
        self.preemptions: list[int] = []
        self._noise = np.random.default_rng([setting.seed, 2])
        self._waiting = deque(enumerate(setting.workload.items))
        self._sent = 0
        self._to_measure: set[str] = set()

    # --- the engine's loop -----------------------------------------------------------------------------

    def run(self) -> None:
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
            over = self.now - self.setting.end
            if over >= 0.0 and (not self._to_measure or over > self.setting.drain):
                return

    def _schedule(self) -> ScheduledStep | None:
        began = time.perf_counter()
        scheduled = self.scheduler.schedule(self.now)
        self.planning += time.perf_counter() - began
        return scheduled

    def _duration(self, scheduled: ScheduledStep) -> float:
        seconds = self._device.predict(scheduled.forecast.load)
        seconds *= self.profile.factors.get(scheduled.step.bucket, 1.0)
        if self.profile.noise:
            seconds *= 1.0 + float(np.interp(self._noise.random(), self._quantiles, self.profile.noise))
        return seconds

    def _finish(self, scheduled: ScheduledStep, begin: float, end: float) -> None:
        self.now = end
        sampling = Counter(entry.request_id for entry in scheduled.step.entries if entry.samples)
        samples = (self.TOKEN,) * sampling.total()
        events = self.scheduler.update(StepResult(scheduled.step, samples, end - begin), end)
        self.steps += 1
        error = 1.0 - scheduled.forecast.seconds / (end - begin)
        self.error_sums[0] += error
        self.error_sums[1] += abs(error)
        if self.setting.warmup <= end < self.setting.end:
            self.widths[0] += sampling.total()
            self.widths[1] += len(sampling)
            self.tokens += sampling.total()
        for event in events:
            if type(event) is TokenEmitted:
                self.records[event.request_id].emit(end)
            elif type(event) is Finished:
                self.preemptions.append(event.usage.preemptions)
                self._answered(event.request_id)

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
        slo = Slo(tpot=self.setting.tpot_slo, ttft=self.setting.ttft_slo)
        request = item.request(str(index), slo, index)
        self.records[request.id] = Record(item, now)
        if self.setting.warmup <= now < self.setting.end:
            self._to_measure.add(request.id)
        self.scheduler.add(request, now)

    def _answered(self, request_id: str) -> None:
        self.records[request_id].finished = True
        self._to_measure.discard(request_id)
        if self.setting.workload.clients is not None:
            self._send_next(self.now)

    @property
    def measured(self) -> list[Record]:
        """Everything that arrived in the window."""
        window = self.setting.warmup, self.setting.end
        return [record for record in self.records.values() if window[0] <= record.arrival < window[1]]


def unloaded_tpot(profile: Profile) -> float:
    """Seconds per token of one serial request that is served alone."""
    workload = Workload("alone", "poisson", 0, (ALONE,))
    alone = Simulation(Setting(profile=profile.exact(), workload=workload, tpot_slo=1.0), "off")
    alone.run()
    return alone.records["0"].mean_tpot


# --- the row of a policy -----------------------------------------------------------------------------------


def row(policy: str, simulation: Simulation) -> dict[str, Any]:
    """What clients saw of the requests that arrived in the window, and what was served in it."""
    setting = simulation.setting
    end = setting.end if math.isfinite(setting.end) else simulation.now
    seconds = end - setting.warmup
    branches, turns = simulation.widths
    return {
        "policy": policy,
        **client_row(simulation.measured, seconds, tpot_slo=setting.tpot_slo, ttft_slo=setting.ttft_slo),
        "raw_tokens_s": simulation.tokens / seconds,
        "mean_width": branches / turns if turns else None,
    }


def simulate(setting: Setting, policy: str) -> tuple[dict[str, Any], dict[str, float]]:
    """The policy's row, and what the simulation itself took: the latter is not deterministic."""
    gc.disable()  # as in production, where collections are kept out of the loop
    began = time.process_time()
    simulation = Simulation(setting, policy)
    simulation.run()
    gc.enable()
    steps = max(1, simulation.steps)
    cost = {
        "steps": simulation.steps,
        "simulated_s": simulation.now,
        "cpu_s": time.process_time() - began,
        "plan_ms": 1e3 * simulation.planning / steps,
        "bias": simulation.error_sums[0] / steps,
        "mape": simulation.error_sums[1] / steps,
        "preemptions": sum(live for live in simulation.preemptions),
    }
    return row(policy, simulation), cost


# --- command line ------------------------------------------------------------------------------------------

WARMUP, WINDOW, COOLDOWN = 45.0, 45.0, 15.0


COLUMNS = {
    "goodput_mean": ("goodput mean", "{:.0f}"),
    "attainment_mean": ("attained", "{:.1%}"),
    "goodput_stage": ("goodput stage", "{:.0f}"),
    "attainment_stage": ("attained", "{:.1%}"),
    "goodput_critical": ("goodput crit.", "{:.0f}"),
    "attainment_critical": ("attained", "{:.1%}"),
    "serial_attainment": ("serial", "{:.1%}"),
    "parallel_attainment": ("parallel", "{:.1%}"),
    "ttft_attainment": ("TTFT", "{:.1%}"),
    "raw_tokens_s": ("raw tok/s", "{:.0f}"),
    "mean_width": ("width", "{:.2f}"),
    "e2e_p50_s": ("E2E p50 s", "{:.1f}"),
    "serial_tpot_p99_ms": ("serial p99 ms", "{:.1f}"),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'policy':<24}" + "".join(f"{title:>14}" for title, _ in COLUMNS.values())]
    for each in rows:
        cells = ("-" if each[key] is None else form.format(each[key]) for key, (_, form) in COLUMNS.items())
        lines.append(f"{each['policy']:<24}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description="Compares policies.")
    parser.add_argument("--profile", default="h200-qwen3-32b", help="a shipped profile's name, or a file")
    parser.add_argument("--workload", default="headline", help="headline, headline-closed, or a file")
    parser.add_argument("--policies", default="off,cap:2,cap:4,cap:6,cap:8,eager,taper")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warmup", type=float, default=WARMUP, help="seconds before the window")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds in which requests count")
    parser.add_argument("--cooldown", type=float, default=COOLDOWN, help="seconds of arrivals after it")
    parser.add_argument(
        "--drain", type=float, default=math.inf, help="seconds after it that its requests get"
    )
    parser.add_argument("--rate", type=float, help="requests per second, instead of the workload's own")
    parser.add_argument("--clients", type=int, help="clients of a closed loop, instead of arrivals")
    parser.add_argument("--tpot-slo", type=float, help="seconds, instead of twice the unloaded TPOT")
    parser.add_argument("--controller", default="{}", help="fields of ControllerConfig, as JSON")
    parser.add_argument("--max-chunk", type=int, default=512)
    parser.add_argument("--prompt-floor", type=int, default=32)
    parser.add_argument("--exact", action="store_true", help="without the profile's noise")
    parser.add_argument("--page", type=int, help="tokens of a KV page, instead of the profile's")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="a file, or - for standard output")
    options = parser.parse_args(arguments)

    profile = Profile.load(options.profile)
    profile = profile.exact() if options.exact else profile
    if options.page is not None:
        tokens = profile.num_pages * profile.page_size
        profile = replace(profile, page_size=options.page, num_pages=tokens // options.page)
    end = options.warmup + options.window
    setting = Setting(
        profile=profile,
        workload=named(
            options.workload,
            options.seed,
            end + options.cooldown,
            rate=options.rate,
            clients=options.clients,
        ),
        tpot_slo=options.tpot_slo or TPOT_SLO_MULTIPLE * unloaded_tpot(profile),
        warmup=options.warmup,
        end=end,
        drain=options.drain,
        seed=options.seed,
        controller=ControllerConfig(**json.loads(options.controller)),
        max_chunk=options.max_chunk,
        prompt_floor=options.prompt_floor,
    )
    policies = options.policies.split(",")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.processes, len(policies)), mp_context=spawn) as pool:
        results = [*pool.map(partial(simulate, setting), policies)]
    result = {
        "profile": profile.name,
        "workload": options.workload,
        "seed": options.seed,
        "tpot_slo_ms": 1e3 * setting.tpot_slo,
        "ttft_slo_s": setting.ttft_slo,
        "page_size": profile.page_size,
        "warmup_s": options.warmup,
        "window_s": options.window,
        "drain_s": options.drain if math.isfinite(options.drain) else None,
        "statistics": setting.workload.statistics(),
        "rows": [each for each, _ in results],
    }
    write(result, options.json)
    out = sys.stderr if options.json == "-" else sys.stdout
    print(table(result["rows"]), file=out)
    for each, cost in results:
        print(
            f"{each['policy']:<10}" + ", ".join(f"{key} {value:.4g}" for key, value in cost.items()), file=out
        )
    return result
