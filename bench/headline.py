"""The comparison of docs/results.md, by one command: plans the runs, makes those that fit the time, resumes.

    python -m bench.headline bench/results/headline --minutes 25 -- --model qwen3-32b --load-format random

What follows `--` are arguments of the taper-serve that is started. Every run is a policy at a load with one
seed, as `bench.load.goodput` plays it, and is written to the folder as soon as it is over. Runs that the
folder has already are not made again, whoever made them on whichever host; the table and the picture are of
everything that it has. Without minutes, nothing is run.

The most telling runs come first: at every load the rivals at seed 1, then these at the other seeds, then the
other caps. At one load the answers are also put together by the client (bench.load.client_forks).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench import pictures
from bench.command import Command, split
from bench.load import goodput
from bench.load.measures import COLUMNS
from bench.result import head, say, write
from bench.server import started
from bench.timing import clock

RIVALS = ("taper", "eager", "off", "cap:4")
OTHERS = ("cap:2", "cap:6", "cap:8")
SEEDS = (1, 2, 3)


class Load(NamedTuple):
    """A workload by its name, and requests a second; or clients, in a closed loop. `fork`: who branches."""

    workload: str
    amount: float
    closed: bool = False
    fork: str = "server"

    @property
    def arguments(self) -> list[str]:
        """Of bench.load.goodput."""
        amount = ["--clients" if self.closed else "--rates", f"{self.amount:g}"]
        return ["--workload", self.workload, *amount, "--fork", self.fork]

    def __str__(self) -> str:
        by_client = "" if self.fork == "server" else ", forked by the client"
        return f"{self.workload} {self.amount:g}{by_client}"


# The knee of `mixed` is what bench.simulate says that taper serves within its targets, rounded to a tenth.
LOADS = (
    Load("headline", 1.4),
    Load("headline-closed", 40, closed=True),
    Load("headline", 1.6),
    Load("mixed", 2.4),
)
# What a user does whose server knows no branches: a request for each, over a prefix cache.
BY_CLIENT, ITS_POLICIES = Load("headline", 1.4, fork="client"), ("taper", "eager")


class Run(NamedTuple):
    load: Load
    seed: int
    policy: str


def plan() -> Iterator[Run]:
    """All runs, the most telling first."""
    for seeds, policies in ((SEEDS[:1], RIVALS), (SEEDS[1:], RIVALS), (SEEDS[:1], OTHERS)):
        for seed, load in itertools.product(seeds, LOADS):
            yield from (Run(load, seed, policy) for policy in policies)
        if policies == RIVALS:
            yield from (Run(BY_CLIENT, seed, policy) for seed in seeds for policy in ITS_POLICIES)


# --- what a folder has -------------------------------------------------------------------------------------


def results(folder: Path) -> list[dict[str, Any]]:
    """Of bench.load.goodput, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def made(found: Iterable[Mapping[str, Any]]) -> dict[Run, Mapping[str, Any]]:
    """The row of every run. Raises ValueError if a run was made twice: one of the two would be a choice."""
    rows: dict[Run, Mapping[str, Any]] = {}
    for result in found:
        closed = {(point["load"], point["seed"]): point["closed"] for point in result["points"]}
        for row in result["rows"]:
            is_closed = closed[row["load"], row["seed"]]
            load = Load(result["workload"], row["load"], is_closed, result["fork"])
            run = Run(load, row["seed"], row["policy"])
            if run in rows:
                raise ValueError(f"{run.policy} at {load}, seed {run.seed}, was made twice")
            rows[run] = row
    return rows


def file_of(folder: Path, load: Load, seed: int) -> Path:
    """One that is not there yet."""
    by_client = "" if load.fork == "server" else "-by-client"
    name = f"{load.workload}-{load.amount:g}{by_client}-seed{seed}"
    names = itertools.chain([name], (f"{name}-{part}" for part in itertools.count(2)))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


# --- running -----------------------------------------------------------------------------------------------


def run(wanted: Sequence[Run], folder: Path, address: str, url: str | None, options: Any) -> None:
    """Makes the runs, one load and seed after another, until `options.until` on the clock."""
    slo: list[str] = []
    for (load, seed), runs in itertools.groupby(wanted, lambda each: (each.load, each.seed)):
        left = options.until - clock()
        if left <= options.warmup + options.window:
            return
        path = file_of(folder, load, seed)
        times = ("warmup", "window", "cooldown", "drain")
        arguments = [
            *load.arguments,
            *("--seeds", str(seed), "--policies", ",".join(each.policy for each in runs)),
            *itertools.chain.from_iterable((f"--{name}", f"{getattr(options, name):g}") for name in times),
            *("--scale", f"{options.scale:g}", "--budget-seconds", f"{left:.0f}", "--json", str(path)),
            *slo,
        ]
        parser = goodput.command()
        found = goodput.compare(parser.parse_args(arguments), parser.typed(arguments), address, url)
        if found["rows"]:
            write(found, path)  # with what was left out
        slo = ["--tpot-slo", f"{found['tpot_slo_ms'] / 1e3:.6f}"]  # the first finds it for all of a server's
        if "stopped" in found:
            return


# --- what it came to ---------------------------------------------------------------------------------------

MEANS = ("goodput_stage", "mean_width", "e2e_p50_s", "gap_p99_ms")


class Summary(NamedTuple):
    """A policy at a load, over its seeds. `late`: requests that missed a target, of all that arrived."""

    load: Load
    policy: str
    seeds: int
    arrived: int
    late: int
    means: Mapping[str, float | None]

    @property
    def goodput(self) -> float:
        return self.means["goodput_stage"] or 0.0

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "load": str(self.load)}

    def line(self, best: float) -> str:
        cells = "".join(f"{COLUMNS[name].cell(value):>12}" for name, value in self.means.items())
        attained = 1.0 - self.late / self.arrived if self.arrived else 0.0
        ratio = f"{best / self.goodput:.2f}" if self.goodput else "-"
        return f"{self.policy:<8}{self.seeds:>6}{ratio:>8}{attained:>10.1%}{self.late:>6}{cells}"


def summaries(rows: Mapping[Run, Mapping[str, Any]]) -> Iterator[Summary]:
    """Of every load and policy that has a run."""
    for load, policy in itertools.product((*LOADS, BY_CLIENT), (*RIVALS, *OTHERS)):
        own = [row for each, row in rows.items() if (each.load, each.policy) == (load, policy)]
        if not own:
            continue
        met = sum(round(row["attainment_stage"] * row["arrived"]) for row in own if row["arrived"])
        arrived = sum(row["arrived"] for row in own)
        means = {name: _mean([row[name] for row in own]) for name in MEANS}
        yield Summary(load, policy, len(own), arrived, arrived - met, means)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def table(rows: Mapping[Run, Mapping[str, Any]]) -> str:
    """For each load, every policy beside taper, of which it says how many times the goodput taper has."""
    lines: list[str] = []
    for load, of_load in itertools.groupby(summaries(rows), lambda each: each.load):
        policies = [*of_load]
        taper = next((each.goodput for each in policies if each.policy == "taper"), 0.0)
        titles = "".join(f"{COLUMNS[name].title:>12.12}" for name in MEANS)
        lines += [f"{load}", f"{'policy':<8}{'seeds':>6}{'taper/':>8}{'attained':>10}{'late':>6}{titles}"]
        lines += [each.line(taper) for each in policies]
    return "\n".join(lines)


# --- command line ------------------------------------------------------------------------------------------


def command() -> Command:
    parser = Command("bench.headline", "Compares policies on one server at all loads of docs/results.md.")
    add = parser.add_argument
    add("folder", type=Path, help="what holds the results")
    add("--minutes", type=float, default=0.0, help="that it may take, with the server's start")
    parser.add_window(warmup=30.0, window=30.0, cooldown=5.0, drain=300.0)
    add("--scale", type=float, default=1.0, help="factor of all lengths, for a small model")
    add("--plot", type=Path, help="the picture, over the simulated lines (needs matplotlib)")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, of_server = split(arguments)
    options = command().parse_args(own)
    options.until = clock() + 60.0 * options.minutes
    there = made(results(options.folder))
    wanted = [each for each in plan() if each not in there]
    say(f"{len(there)} runs are there, {len(wanted)} are missing", options.json)
    if wanted and options.minutes:
        with started(of_server) as server:
            run(wanted, options.folder, server.address, server.metrics_url, options)
    rows = made(results(options.folder))
    say(table(rows), options.json)
    missing = [each for each in plan() if each not in rows]
    found = {
        **head(command().typed(arguments)),
        "summaries": [each.as_json() for each in summaries(rows)],
        "missing": [f"{each.policy} at {each.load}, seed {each.seed}" for each in missing],
    }
    write(found, options.json)
    if options.plot is not None:
        pictures.headline([pictures.LINES, *sorted(options.folder.glob("*.json"))], options.plot)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
