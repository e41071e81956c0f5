"""What each part of the controller is worth, in simulation: one row for each part left out or exchanged, and
for eager, which may do without the controller's way of reading prompts.

    python -m bench.simulate.ablations --workload headline --seed 1 --json OUT

The forms of the predictor are those of the profile, all fitted to the same measured steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import Command
from bench.load.measures import Window
from bench.load.workload import named
from bench.progress import tracked
from bench.result import conclude, head, keep
from bench.simulate.policies import COOLDOWN, WARMUP, WINDOW, table
from bench.simulate.profile import Profile, late_as
from bench.simulate.simulation import Setting, Simulation, in_processes, targets
from bench.timing import no_collections
from scheduler.config import RESERVE
from scheduler.controller import Controller, ControllerConfig, Turn
from scheduler.draft import StepDraft
from scheduler.events import Event, TokenEmitted
from scheduler.flight import Flight
from scheduler.live_request import LiveRequest
from scheduler.policy import AdmissionPolicy, Baseline, Extra, Taper
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import StepResult

# --- other predictors --------------------------------------------------------------------------------------


def unpadded(profile: Profile) -> StepLatencyModel:
    """Rows are priced as if nothing were padded: the line between one bucket and the next."""
    steps = profile.bucket_seconds

    def seconds(rows: int) -> float:
        return float(np.interp(rows, [*steps], [*steps.values()]))

    return StepLatencyModel(steps, costs=profile.costs, row_seconds=seconds)


# --- other controllers -------------------------------------------------------------------------------------


class Unbudgeted(Taper):
    """All that fits the largest bucket."""

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        return super().admit(extras, baseline._replace(budget=math.inf), latency)


class Replanned(Taper):
    """Decides in every so many steps how many extras run, and keeps to their number in between."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every = every
        self._calls = self._admitted = 0

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        if self._calls % self._every == 0:
            self._admitted = len(super().admit(extras, baseline, latency))
        self._calls += 1
        return extras[: self._admitted]


class DeadlinePerBranch(Controller):
    """Every branch that could advance has a deadline of its own: what waits becomes the most urgent.

    emitted  when each branch, by its request and number, had its last token: see `TellsBranches`
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.emitted: dict[tuple[str, int], float] = {}

    def deadlines(self, decoding: Sequence[LiveRequest], flights: Sequence[Flight]) -> list[float]:
        expected = {
            (entry.request_id, entry.branch): flight.end
            for flight in flights
            for entry in flight.step.entries
            if entry.samples
        }
        due: list[float] = []
        for live in decoding:
            request, resumed = live.request, live.pace.resumed
            for branch in live.runnable():
                key = request.id, branch.id
                last = expected.get(key) or self.emitted.get(key, resumed)
                due.append(max(last, resumed) + request.slo.tpot)
        return due


class TellsBranches(Scheduler):
    """Tells its controller when each branch had a token."""

    def update(self, result: StepResult, now: float) -> list[Event]:
        assert isinstance(self.controller, DeadlinePerBranch)
        events = super().update(result, now)
        for event in events:
            if isinstance(event, TokenEmitted):
                self.controller.emitted[event.request_id, event.branch] = now
        return events


class StampedAtPlanning(Controller):
    """A deadline counts from when the step of the last token was planned to begin."""

    def deadlines(self, decoding: Sequence[LiveRequest], flights: Sequence[Flight]) -> list[float]:
        begun = {live: flight.end - flight.forecast.seconds for flight in flights for live in flight.sampling}
        return [self.deadline(live, begun.get(live)) for live in decoding]


class Banking(Controller):
    """A request that is ahead of its pace may be later with its next token, by up to BANK targets."""

    BANK = 2.0

    def deadline(self, live: LiveRequest, emission: float | None) -> float:
        due, tpot = super().deadline(live, emission), live.request.slo.tpot
        return due + min(max(0.0, live.pace.ahead(emission)), self.BANK * tpot)


class WholeChunks(Controller):
    """Prompts are read by whole chunks, whatever the budget."""

    def read_prompts(self, draft: StepDraft, reading: Sequence[Turn], *, at_pace: bool) -> None:
        for turn in reading if at_pace else ():
            rows = self.config.max_chunk - draft.rows_of(turn.live)
            if turn.live.resident and draft.left(turn.branch):
                draft.add(turn.live, turn.branch, rows)


# --- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """What differs from the full controller; `reserve`, if it is not the setting's."""

    policy: str = "taper"
    admission: Callable[[], AdmissionPolicy] | None = None
    config: ControllerConfig = ControllerConfig()  # noqa: RUF009 - frozen
    reserve: float | None = None
    latency: Callable[[Profile], StepLatencyModel] = Profile.latency
    controller: type[Controller] = Controller
    scheduler: type[Scheduler] = Scheduler


VARIATIONS = {
    "full": Variation(),
    "no slack budget": Variation(admission=Unbudgeted),
    "no repayment": Variation(config=ControllerConfig(repay=0.0)),
    "no repayment, rho 0.8": Variation(config=ControllerConfig(repay=0.0, rho=0.8)),
    "no repayment, quantile margin": Variation(config=ControllerConfig(repay=0.0, rho=None)),
    "rho 0.8": Variation(config=ControllerConfig(rho=0.8)),
    "re-plan every 8": Variation(admission=partial(Replanned, 8)),
    "re-plan every 32": Variation(admission=partial(Replanned, 32)),
    "constant": Variation(latency=partial(Profile.latency, form="constant")),
    "linear, raw KV": Variation(latency=partial(Profile.latency, form="linear")),
    "linear, unique KV": Variation(latency=partial(Profile.latency, form="linear-unique")),
    "staircase, raw KV": Variation(latency=partial(Profile.latency, form="staircase-raw")),
    "no padding in the price": Variation(latency=unpadded),
    "deadline per branch": Variation(controller=DeadlinePerBranch, scheduler=TellsBranches),
    "stamp at planning": Variation(controller=StampedAtPlanning),
    "no joint prompt budget": Variation(controller=WholeChunks),
    "bank of 2": Variation(controller=Banking),
    "fill off": Variation(config=ControllerConfig(fill=False)),
    "KV not reserved": Variation(reserve=0.0),
    "cheapest first": Variation(policy="taper:linear"),
    "level by level": Variation(policy="taper:concave"),
    "the paper's form": Variation(
        policy="taper:paper",
        config=ControllerConfig(rho=0.8, repay=0.0, fill=False),
        latency=partial(Profile.latency, form="linear"),
    ),
    "eager": Variation(policy="eager"),
    "eager, no joint prompt budget": Variation(policy="eager", controller=WholeChunks),
}


def ablate(setting: Setting, name: str) -> dict[str, Any]:
    variation = VARIATIONS[name]
    reserve = setting.reserve if variation.reserve is None else variation.reserve
    simulation = Simulation(
        replace(setting, controller=variation.config, reserve=reserve),
        variation.policy,
        latency=variation.latency(setting.profile),
        controller=variation.controller,
        scheduler=variation.scheduler,
    )
    if variation.admission is not None:
        simulation.scheduler.controller.policy = variation.admission()
    with no_collections():
        simulation.serve()
    return simulation.run().row() | {"policy": name}


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.simulate.ablations", "Ablates the controller.")
    parser.add_argument("--profile", default="h200-qwen3-32b")
    parser.add_argument("--workload", default="headline")
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS, default=[*VARIATIONS])
    parser.add_argument("--rate", type=float, help="requests per second, instead of the workload's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reserve", type=float, default=RESERVE, help="as of taper-serve")
    parser.add_argument("--step-log", type=Path, help="replay its lateness in place of the profile's noise")
    parser.add_argument("--warmup", type=float, default=WARMUP)
    parser.add_argument("--window", type=float, default=WINDOW)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    window = Window(options.warmup, options.warmup + options.window)
    profile = late_as(Profile.load(options.profile), options.step_log)
    setting = Setting(
        profile=profile,
        workload=named(options.workload, options.seed, window.end + COOLDOWN, rate=options.rate),
        slo=targets(profile),
        window=window,
        seed=options.seed,
        reserve=options.reserve,
    )
    rows: list[dict[str, Any]] = []
    result = {
        **head(parser.typed(arguments)),
        "profile": profile.name,
        "reserve": options.reserve,
        "sha256": setting.workload.digest,
        "rows": rows,
    }
    with in_processes(options.processes) as pool:
        ablated = pool.map(partial(ablate, setting), options.variations)
        for row in tracked(ablated, "variations", len(options.variations)):
            rows.append(row)
            keep(result, options.json)
    return conclude(result, table(rows), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
