"""Times the scheduler's host work in steady decoding: the planner's decision alone, a whole plan, an update.

    python -m bench.host.scheduling --json OUT

Requests with a prompt of 1024 tokens have forked once and decode without end; steps are planned and taken in
as the engine does it, with one in flight. The planner is what a policy adds to a step: pricing the extra
branches, the budget and the admission. Garbage collection is as in production: frozen.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.command import Command
from bench.result import conclude, head
from bench.simulate.profile import Profile
from bench.simulate.simulation import MAX_CONTEXT, NoText
from bench.timing import Stopwatch, no_collections
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, ScheduledStep, StepResult
from scheduler.stopping import Stopping

CASES = ((64, 8, 10_000), (512, 8, 300))  # requests, branches of each, plans
PROMPT = 1024


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
        Controller(latency),
        NoText(),
    )
    spec = BranchSpec(stopping=Stopping(max_tokens=10_000), prefix=(1,))
    stages = (SerialStage(stopping=Stopping(max_tokens=1)), ParallelStage(branches=(spec,) * branches))
    tpot = 1.2 * latency.rows_seconds(rows // 2)
    for number in range(requests):
        slo = Slo(tpot=tpot, ttft=1e6)
        made.add(Request(id=str(number), prompt=(1,) * PROMPT, program=Plan(stages=stages), slo=slo), 0.0)
    return made


DECISIONS = ("extras", "budget", "admitted")


def times(requests: int, branches: int, plans: int) -> dict[str, list[float]]:
    """Seconds of each of so many steps after all requests have forked: planner, plan, update."""
    made, watch = scheduler(requests, branches), Stopwatch()
    watch.on(made.controller, *DECISIONS)
    watch.on(made, "schedule", "update")
    flying: deque[ScheduledStep] = deque()
    seconds: dict[str, list[float]] = {"planner": [], "plan": [], "update": []}
    now, steady = 0.0, False
    with no_collections():
        while len(seconds["plan"]) < plans:
            scheduled = made.schedule(now)
            if scheduled is not None:
                flying.append(scheduled)
                if len(flying) < 2:
                    continue
            landed = flying.popleft()
            now += landed.forecast.seconds
            samples = (Sample(0),) * sum(entry.samples for entry in landed.step.entries)
            made.update(StepResult(landed.step, samples, landed.forecast.seconds), now)
            taken = watch.take()
            steady = steady or made.load().running_branches == requests * branches
            if steady:
                seconds["planner"].append(sum(taken.get(name, 0.0) for name in DECISIONS))
                seconds["plan"].append(taken["schedule"])
                seconds["update"].append(taken["update"])
    return seconds


def measure(requests: int, branches: int, plans: int) -> dict[str, Any]:
    row: dict[str, Any] = {"requests": requests, "branches": branches, "plans": plans}
    for name, seconds in times(requests, branches, plans).items():
        row |= {f"{name}_p{q}_ms": 1e3 * float(np.percentile(seconds, q)) for q in (50, 99)}
    return row


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.host.scheduling", "Times planning.")
    parser.add_argument("--plans", type=int, help="instead of each case's own number")
    options = parser.parse_args(arguments)
    result = {**head(parser.typed(arguments)), "rows": []}
    for requests, branches, plans in CASES:
        row = measure(requests, branches, options.plans or plans)
        result["rows"].append(row)
    lines = [", ".join(f"{key} {value:.4g}" for key, value in row.items()) for row in result["rows"]]
    return conclude(result, "\n".join(lines), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
