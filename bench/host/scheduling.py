"""Times the scheduler's host work in steady decoding: the planner's decision alone, a whole plan, an update.

    python -m bench.host.scheduling --json OUT

Requests with a prompt of 1024 tokens have forked once and decode without end; steps are planned and taken in
as the engine does it, with one in flight. The planner is what a policy adds to a step: pricing the extra
branches, the budget and the admission. Garbage collection is as in production: frozen.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.result import write
from bench.simulate.simulation import MAX_CONTEXT, Bytes, Profile
from scheduler.predictor import StepLatencyModel
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage
from scheduler.request import Request, Slo, Stopping
from scheduler.scheduler import Scheduler, SchedulerConfig
from scheduler.step import Sample, ScheduledStep, StepResult

CASES = ((64, 8, 10_000), (512, 8, 300))  # requests, branches of each, plans
PROMPT = 1024


class Stopwatch:
    """Adds up the seconds that calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            self.seconds += time.perf_counter() - began
            return result

        return timed

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


def scheduler(requests: int, branches: int) -> Scheduler:
    """Queued requests; the SLO leaves room for all of their branches."""
    rows = 2 * requests * branches
    seconds = Profile.load("h200-qwen3-32b").bucket_seconds
    # KV is nearly free, so that as many branches fit in the last step as in the first.
    latency = StepLatencyModel(seconds | {max(1024, rows): 2 * seconds[512]}, 1e-12)
    made = Scheduler(
        SchedulerConfig(
            num_pages=256 * rows,
            page_size=64,
            num_slots=2 * latency.buckets.largest,
            max_context=MAX_CONTEXT,
            max_queue=requests,
            prefix_cache=False,
        ),
        latency,
        Bytes(),
    )
    spec = BranchSpec(stopping=Stopping(max_tokens=10_000), prefix=(1,))
    stages = (SerialStage(stopping=Stopping(max_tokens=1)), ParallelStage(branches=(spec,) * branches))
    tpot = 1.2 * latency.rows_seconds(rows // 2)
    for number in range(requests):
        slo = Slo(tpot=tpot, ttft=1e6)
        made.add(Request(id=str(number), prompt=(1,) * PROMPT, program=Plan(stages=stages), slo=slo), 0.0)
    return made


def times(requests: int, branches: int, plans: int) -> dict[str, list[float]]:
    """Seconds of each of so many steps after all requests have forked: planner, plan, update."""
    made = scheduler(requests, branches)
    flying: deque[ScheduledStep] = deque()
    seconds: dict[str, list[float]] = {"planner": [], "plan": [], "update": []}
    now, steady = 0.0, False
    gc.collect()
    gc.freeze()
    gc.disable()

    watches = {name: Stopwatch() for name in seconds}
    for decision in ("_extras", "_budget", "_admitted"):
        setattr(made, decision, watches["planner"].on(getattr(made, decision)))
    schedule, update = watches["plan"].on(made.schedule), watches["update"].on(made.update)
    while len(seconds["plan"]) < plans:
        scheduled = schedule(now)
        if scheduled is not None:
            flying.append(scheduled)
            if len(flying) < 2:
                continue
        landed = flying.popleft()
        now += landed.forecast.seconds
        samples = (Sample(0),) * sum(entry.samples for entry in landed.step.entries)
        update(StepResult(landed.step, samples, landed.forecast.seconds), now)
        taken = {name: watch.take() for name, watch in watches.items()}
        steady = steady or made.load().running_branches == requests * branches
        if steady:
            for name, value in taken.items():
                seconds[name].append(value)
    gc.enable()
    gc.unfreeze()
    return seconds


def measure(requests: int, branches: int, plans: int) -> dict[str, Any]:
    row: dict[str, Any] = {"requests": requests, "branches": branches, "plans": plans}
    for name, seconds in times(requests, branches, plans).items():
        row |= {f"{name}_p{q}_ms": 1e3 * float(np.percentile(seconds, q)) for q in (50, 99)}
    return row


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.host.scheduling", description="Times planning.")
    parser.add_argument("--plans", type=int, help="instead of each case's own number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    result = {"rows": [measure(r, b, options.plans or plans) for r, b, plans in CASES]}
    for row in result["rows"]:
        print(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    write(result, options.json)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
