"""Simulated maps: how the policies fare where one thing changes, from the load to the predictor's bias.

    python -m bench.simulate.maps --json OUT --plot PNG
    python -m bench.simulate.maps --maps load clients --seeds 1 2 3 --json OUT
    python -m bench.simulate.maps --maps sustained --late-as RESULT.json --json OUT

Each map starts at the open headline point (fanout, bursty, 1.4 requests a second, TPOT target twice the
unloaded one) and changes one thing of it.

    load      requests per second
    clients   of a closed loop
    slo       the TPOT target, in times the unloaded TPOT
    share     the share of requests that branch
    fanout    the number of branches, at the same offered tokens per second
    family    the other families of bench.load.workload, at loads that strain the server
    margin    rho, with deadlines that repay what a request fell behind, and with those that forget it
    bias      of a predictor that does not learn, with both kinds of deadlines
    fork      requests per second, with answers that the server branches, joined by their KV or read again,
              and that clients put together from requests without branches (where policies do not differ: a
              request has nothing to admit)
    reserve   the share of running requests' KV that a new one must leave to them, at several loads
    limits    of branches, in times the tokens that they have, with several such shares
    sustained requests per second, over five minutes: what piles up in half a minute has become late by then
    lasting   the seconds for which the load lasts and is measured, after half a minute of it
    kept      the share of running requests' KV that a new one must leave to them, over five minutes
    starts    the share of the tightest TPOT target up to which a step may grow by requests that start

Requests that arrive in the window are measured, all of them, and served to their end. Steps are as late as
those of a run were (--late-as: its row has them, by bench.headline), or else as the profile says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.command import Command
from bench.load.measures import Window, cells
from bench.load.workload import TPOT_SLO_MULTIPLE, Item, Workload, fanout, lognormal, named, open_loop
from bench.plot import plot_maps
from bench.progress import tracked
from bench.result import conclude, head, keep
from bench.simulate.lateness import Lateness
from bench.simulate.policies import COOLDOWN, WARMUP, WINDOW
from bench.simulate.profile import Profile
from bench.simulate.simulation import Setting, Simulation, in_processes, targets, unloaded_tpot
from bench.timing import no_collections
from scheduler.config import RESERVE
from scheduler.controller import Controller, ControllerConfig
from scheduler.predictor import StepLatencyModel, StepLoad

RATE = 1.4
CAPS = ("cap:2", "cap:4", "cap:6", "cap:8")
ALL = ("off", *CAPS, "eager", "taper")
MOST = ("off", *CAPS[:3], "eager", "taper")
SOME = ("off", "cap:4", "eager", "taper")
OFFERED = RATE * 3000.0  # tokens per second, about those of the headline point
FAMILIES = {"mixed": 3.0, "reasoning": 0.9, "light": 2.4, "best-of-n": 2.0, "azure-conv": 3.5}
SUSTAINED = Window(60.0, 360.0)
LASTING_WARMUP = 30.0  # seconds, as measured runs have
HALF_MINUTE = Window(LASTING_WARMUP, LASTING_WARMUP + 30.0)
FIGURES = ("goodput_stage", "attainment_stage")
OF_LOAD = ("load", "clients", "fork", "sustained")  # maps of which there is a capacity
CAPABLE = 0.99  # attainment with which a policy still has the capacity for a load


class Case(NamedTuple):
    """One simulation: `label` is the policy, or the variant of taper, that serves map's point `x`."""

    map: str
    x: float | str
    label: str
    seed: int


# --- what changes ------------------------------------------------------------------------------------------


class Biased(StepLatencyModel):
    """A predictor that is off by a share, and does not learn."""

    bias = 0.0

    def rows_seconds(self, rows: int) -> float:
        return (1.0 + self.bias) * super().rows_seconds(rows)

    def reading_seconds(self, load: StepLoad) -> float:
        return (1.0 + self.bias) * super().reading_seconds(load)

    def row_line(self, context: int) -> tuple[float, float]:
        fixed, per_own = super().row_line(context)
        return (1.0 + self.bias) * fixed, (1.0 + self.bias) * per_own

    def observe(self, load: StepLoad, seconds: float) -> None:
        self.accuracy.observe(seconds / self.predict(load) - 1.0)


def biased(profile: Profile, bias: float) -> StepLatencyModel:
    """Off by `bias` from what steps take on a loaded server."""
    hot = {str(b): seconds * profile.factors.get(b, 1.0) for b, seconds in profile.bucket_seconds.items()}
    model = Biased.from_profile({"forms": {"staircase": profile.forms["staircase"] | {"buckets": hot}}})
    model.bias = bias  # type: ignore[attr-defined]
    return model


def with_share(workload: Workload, share: float) -> Workload:
    """The same arrivals; of the requests, this share branches."""
    rng = np.random.default_rng([workload.seed, 3])

    def drawn(parallel: bool, arrival: float) -> Item:
        while True:
            prompt, stages = fanout(rng)
            if any(len(stage) > 1 for stage in stages) == parallel:
                return Item(arrival, prompt, stages)

    items = tuple(drawn(bool(rng.random() < share), item.arrival) for item in workload.items)
    return replace(workload, items=items)


def with_fanout(seed: int, branches: int, seconds: float) -> Workload:
    """Four fifths of the requests fork once, into so many branches; OFFERED tokens arrive a second."""
    each = 0.8 * (80 + branches * 200 + 120) + 0.2 * 400
    rng = np.random.default_rng([seed, 4])
    made = open_loop("fanout", "bursty", OFFERED / each, seconds, seed)

    def item(arrival: float) -> Item:
        prompt = lognormal(rng, 800, 0.6)
        if rng.random() >= 0.8:
            return Item(arrival, prompt, ((lognormal(rng, 400, 0.6),),))
        wide = tuple(lognormal(rng, 200, 0.5) for _ in range(branches))
        return Item(arrival, prompt, ((lognormal(rng, 80, 0.4),), wide, (lognormal(rng, 120, 0.4),)))

    return replace(made, items=tuple(item(each.arrival) for each in made.items))


BY_CLIENT, READ_AGAIN = "client forks", "taper, reprefill"
LOADS: dict[str, dict[str, Any]] = {
    "1.4/s": {"rate": 1.4},
    "1.8/s": {"rate": 1.8},
    "40 clients": {"clients": 40},
}
STARTS = {
    "1.4/s": (1.4, SUSTAINED),
    "1.8/s": (1.8, SUSTAINED),
    "1.8/s, 30 s": (1.8, HALF_MINUTE),
}
RESERVES = {"all": 1.0, "half": 0.5, "a quarter": 0.25, "a tenth": 0.1, "nothing": 0.0}
MARGINS = {"repaying": ControllerConfig(), "forgetting": ControllerConfig(repay=0.0)}

POINTS: dict[str, tuple[Sequence[float | str], Sequence[str]]] = {
    "load": ((0.8, 1.0, 1.2, 1.4, 1.6, 1.8), ALL),
    "clients": ((10, 20, 30, 40, 60), ALL),
    "slo": ((1.5, 2.0, 2.5, 3.0), SOME),
    "share": ((0.0, 0.25, 0.5, 0.75, 1.0), SOME),
    "fanout": ((4, 8, 16, 32, 64), SOME),
    "family": ([*FAMILIES], SOME),
    "margin": ((0.6, 0.7, 0.8, 0.9, 1.0, "quantile"), [*MARGINS]),
    "bias": ((-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2), [*MARGINS]),
    "fork": ((0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6), ("taper", READ_AGAIN, BY_CLIENT)),
    "reserve": ((1.0, 0.25, 0.1, 0.0), [f"{policy}, {load}" for load in LOADS for policy in SOME]),
    "limits": ((1.0, 2.0, 4.0, 8.0), [*RESERVES]),
    "sustained": ((0.8, 1.0, 1.2, 1.4, 1.6, 1.8), MOST),
    "lasting": ((30.0, 60.0, 120.0), MOST),
    "kept": ((1.0, 0.1, 0.0), MOST),
    "starts": ((Controller.START_MARGIN, 0.85, 0.75), [*STARTS]),
}
"""By map: what changes, and who is compared."""
MAPS = (*POINTS,)


def cases(maps: Iterable[str], seeds: Sequence[int]) -> Iterator[Case]:
    for name in maps:
        xs, labels = POINTS[name]
        for x in xs:
            for label in labels:
                yield from (Case(name, x, label, seed) for seed in seeds)


def starting(margin: float) -> type[Controller]:
    """One that lets requests start as long as a step takes at most this share of the tightest target."""

    class Starting(Controller):
        START_MARGIN = margin

    return Starting


def window_of(case: Case) -> Window:
    """Whose requests count."""
    if case.map in ("sustained", "kept"):
        return SUSTAINED
    if case.map == "starts":
        return STARTS[case.label][1]
    if case.map == "lasting":
        return Window(LASTING_WARMUP, LASTING_WARMUP + float(case.x))
    return Window(WARMUP, WARMUP + WINDOW)


def run(profile: Profile, case: Case, *, reserve: float = RESERVE) -> dict[str, Any]:
    """The row of a case; `reserve` is the share of maps that say nothing of it."""
    name, x, label, seed = case
    window = window_of(case)
    seconds = window.end + COOLDOWN
    multiple, limits, controller, latency = TPOT_SLO_MULTIPLE, 1.0, ControllerConfig(), None
    policy = "taper" if label in (*MARGINS, *RESERVES, *STARTS, BY_CLIENT, READ_AGAIN) else label
    kind = Controller
    workload = named("headline", seed, seconds, rate=RATE)
    match name, x:
        case (("load" | "fork" | "sustained"), float()):
            workload = named("headline", seed, seconds, rate=x)
            if label == READ_AGAIN:
                items = (replace(item, join="reprefill") for item in workload.items)
                workload = replace(workload, items=tuple(items))
        case "clients", int():
            workload = named("headline-closed", seed, seconds, clients=x)
        case "slo", float():
            multiple = x
        case "share", float():
            workload = with_share(workload, x)
        case "fanout", int():
            workload = with_fanout(seed, x, seconds)
        case "family", str():
            workload = named(x, seed, seconds, rate=FAMILIES[x])
        case "margin", _:
            controller = replace(MARGINS[label], rho=None if x == "quantile" else float(x))
        case "bias", float():
            controller, latency = MARGINS[label], biased(profile, x)
        case "reserve", float():
            policy, load = label.split(", ")
            reserve, workload = x, named("headline", seed, seconds, **LOADS[load])
        case "kept", float():
            reserve = x
        case "starts", float():
            kind, workload = starting(x), named("headline", seed, seconds, rate=STARTS[label][0])
        case "limits", float():
            limits, reserve = x, RESERVES[label]
    setting = Setting(
        profile=profile,
        workload=workload,
        slo=targets(profile, multiple),
        window=window,
        seed=seed,
        controller=controller,
        reserve=reserve,
        fork="client" if label == BY_CLIENT else "server",
        limits=limits,
    )
    simulation = Simulation(setting, policy, latency=latency, controller=kind)
    with no_collections():
        simulation.serve()
    return {**case._asdict(), **simulation.run().row(), **simulation.footprint(), "policy": label}


def capacity(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """By policy: the highest load of a map up to which the mean attainment over seeds is CAPABLE."""
    attained: dict[str, dict[float, list[float]]] = {}
    for each in rows:
        if each["map"] == name:
            loads = attained.setdefault(each["label"], {})
            loads.setdefault(each["x"], []).append(each["attainment_stage"])
    found: dict[str, float | None] = {}
    for label, loads in attained.items():
        found[label] = None
        for load in sorted(loads):
            if sum(loads[load]) / len(loads[load]) < CAPABLE:
                break
            found[label] = load
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each point of each map, means over the seeds: stage goodput, and stage attainment."""
    lines: list[str] = []
    for name in dict.fromkeys(each["map"] for each in rows):
        of_map = [each for each in rows if each["map"] == name]
        labels = [*dict.fromkeys(each["label"] for each in of_map)]
        lines.append(f"{name:<12}" + "".join(f"{label:>16}" for label in labels))
        for x in dict.fromkeys(each["x"] for each in of_map):
            line = f"{x!s:<12}"
            for label in labels:
                same = [each for each in of_map if (each["x"], each["label"]) == (x, label)]
                mean = {figure: sum(each[figure] or 0.0 for each in same) / len(same) for figure in FIGURES}
                line += cells(mean, FIGURES, width=8)
            lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = Command("bench.simulate.maps", "Simulated maps.")
    parser.add_argument("--profile", default="h200-qwen3-32b", help="a shipped profile's name, or a file")
    parser.add_argument("--late-as", type=Path, metavar="RESULT", help="a run as late as which steps are")
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=[*MAPS])
    parser.add_argument("--at", nargs="+", type=float, help="only these points, instead of all of a map")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--reserve", type=float, default=RESERVE, help="what maps reserve that do not vary it"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    wanted = [case for case in cases(options.maps, options.seeds) if not options.at or case.x in options.at]
    profile = Profile.load(options.profile)
    if options.late_as is not None:
        profile = Lateness.of_run(options.late_as).on(profile)
    found: dict[str, Any] = {
        **head(parser.typed(arguments)),
        "profile": profile.name,
        "late_as": options.late_as and options.late_as.name,
        "reserve": options.reserve,
        "tpot_unloaded_ms": 1e3 * unloaded_tpot(profile),
        "capacity": {},
        "rows": rows,
    }
    simulated = partial(run, profile, reserve=options.reserve)
    with in_processes(options.processes) as pool:
        for row in tracked(pool.map(simulated, wanted), "simulations", len(wanted)):
            rows.append(row)
            keep(found, options.json)
    found["capacity"] = {name: capacity(rows, name) for name in OF_LOAD if name in options.maps}
    lines = [table(rows)]
    for name, by_policy in found["capacity"].items():
        most = ", ".join(f"{label} {load}" for label, load in by_policy.items())
        lines.append(f"capacity, {name}: {most}")
    if options.plot is not None:
        plot_maps(found, options.plot)
    return conclude(found, "\n".join(lines), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
