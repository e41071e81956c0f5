"""The comparison of docs/results.md, by one command: plans the runs, makes those that fit the time, resumes.

    python -m bench.headline bench/results/headline --minutes 25 -- --model qwen3-32b --load-format random \\
        --max-queue 1024 --step-log STEPS.jsonl

What follows `--` are arguments of the taper-serve that is started. Every run is a policy at a load with one
seed, as `bench.load.goodput` plays it, and has a file in the folder as soon as it is over: with the host that
it ran on and, if the server keeps a log of its steps, how late these were (bench.simulate.lateness). What the
folder has already is not made again, whoever made it on whichever host; the table and the picture are of all
that it has. Without minutes, nothing is run. A run that would not end in time is passed over. A folder is
of servers that reserve KV alike (`--reserve`), and of windows of one length: what piles up in half a minute
has become late after five (`--warmup 60 --window 300`).

A card may be there for a dozen runs only, so they are made in the order of what they tell: see `ORDER`, and
`--only` names some of them. Where a host has several cards, each takes a part of the runs, by a call of its
own:

    CUDA_VISIBLE_DEVICES=0 python -m bench.headline FOLDER --part 1/2 ... &
    CUDA_VISIBLE_DEVICES=1 python -m bench.headline FOLDER --part 2/2 ...
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from bench import hardware, pictures
from bench.command import Command, split
from bench.load import goodput
from bench.load.measures import COLUMNS, Window, titles
from bench.load.runs import Load, Made, Run, made, reserved, results
from bench.result import device_of, head, say, versions, write
from bench.server import Server, started
from bench.simulate.lateness import Lateness
from bench.simulate.profile import Profile
from bench.timing import clock
from serve.config import ServerConfig, command_line
from serve.engine.step_log import read_steps
from taper_client.errors import ServiceError

RIVALS = ("taper", "eager", "cap:4", "off")
OTHERS = ("cap:2", "cap:6", "cap:8")
SEEDS = (1, 2, 3)

# As many requests as taper serves within their targets for half a minute.
KEPT = (Load("headline", 1.4), Load("headline", 1.8), Load("headline-closed", 40, closed=True))
# What a user does whose server knows no branches: a request for each, over a prefix cache. There, a policy
# has nothing to decide.
BY_CLIENT, ITS_POLICIES = Load("headline", 1.4, fork="client"), ("taper", "eager")
# Between these loads, and requests of another kind: as many as bench.simulate says that taper serves within
# their targets, rounded to a tenth.
OTHER_LOADS = (Load("headline", 1.6), Load("mixed", 3.4))
# About as many as taper serves for longer, and 1.3 times as many: a refusal in time must not cost goodput.
OVERLOADS = (Load("headline", 1.6, reject=True), Load("headline", 2.1, reject=True), Load("headline", 2.1))
OVERLOAD_WINDOW = 1.5  # times the window of other loads: a whole period of the bursts, if that is 30 s
LOADS = (*KEPT, BY_CLIENT, *OTHER_LOADS, *OVERLOADS)

ORDER = (
    (KEPT, RIVALS, SEEDS[:1]),  # is taper ahead, where it is to keep what it promises?
    ((BY_CLIENT,), ITS_POLICIES[:1], SEEDS[:1]),  # and of a server that knows no branches?
    (OTHER_LOADS, RIVALS[:1], SEEDS[:1]),  # and elsewhere?
    (KEPT, RIVALS, SEEDS[:2]),  # is that more than chance?
    (OVERLOADS, RIVALS[:1], SEEDS[:1]),
    (OTHER_LOADS[:1], ("cap:4",), SEEDS[:1]),  # a cap may keep what taper keeps: here it does not, simulated
    (KEPT, RIVALS, SEEDS),
    (KEPT, OTHERS, SEEDS[:1]),  # is another cap better?
    ((BY_CLIENT,), ITS_POLICIES, SEEDS),
    (OTHER_LOADS, RIVALS, SEEDS),
    (OTHER_LOADS, OTHERS, SEEDS[:1]),
)
"""Blocks of runs, the most telling first: of each, all loads under all policies, one seed after the other."""


def plan() -> list[Run]:
    """All runs, in order; what a block has of those before it is not repeated."""
    runs = (
        Run(load, seed, policy)
        for loads, policies, seeds in ORDER
        for seed, load, policy in itertools.product(seeds, loads, policies)
    )
    return [*dict.fromkeys(runs)]


# --- running -----------------------------------------------------------------------------------------------


def expected_seconds(run: Run, there: Mapping[Run, Made], window: Window) -> float:
    """What it takes: as long as with another seed, or else until its window has ended, and the last answer.
    `off` is slow to end long answers, says bench.simulate, and a client that forks asks for more."""
    known = [each.row["run_s"] for other, each in there.items() if other._replace(seed=run.seed) == run]
    last = 3.0 * window.end if run.policy == "off" else 100.0 if run.load.fork == "client" else 80.0
    return max(known, default=window.end + min(last, window.drain))


def make(wanted: Sequence[Run], options: Namespace, server: Server, config: ServerConfig) -> None:
    """Makes those of the runs that should end before `options.until` on the clock, in their order; one that
    fails is said to.
    """
    slo: list[str] = []
    log = Path(config.step_log) if config.step_log else None
    here = host(options.commit)
    for run in wanted:
        left = options.until - clock()
        window = Window(options.warmup, options.warmup + window_of(run.load, options.window), options.drain)
        if left < expected_seconds(run, made(results(options.folder)), window):
            continue
        seconds = {name: getattr(options, name) for name in ("warmup", "cooldown", "drain")}
        seconds |= {"window": window.seconds, "budget-seconds": left}
        arguments = [
            *run.load.arguments,
            *("--seeds", str(run.seed), "--policies", run.policy),
            *itertools.chain.from_iterable((f"--{name}", f"{each:g}") for name, each in seconds.items()),
            *("--scale", f"{options.scale:g}"),
            *slo,
        ]
        parser = goodput.command()
        typed = parser.parse_args(arguments), parser.typed(arguments)
        try:
            compared = goodput.compare(*typed, server.address, server.metrics_url)
        except (ServiceError, ValueError) as error:
            print(f"bench.headline: {run} failed: {error}", file=sys.stderr)
            continue
        found: dict[str, Any] = {**compared, "reserve": config.reserve, "host": here}
        for row in found["rows"]:  # one, or none if it did not end in time
            write(found, path := options.folder / run.file)
            if log is not None:
                row["lateness"] = lateness(log, row, options.profile)
                write(found, path)
        slo = ["--tpot-slo", f"{found['tpot_slo_ms'] / 1e3}"]  # the first finds it for all of a server's


def window_of(load: Load, usual: float) -> float:
    """Seconds; `usual` are those of other loads."""
    return usual * (OVERLOAD_WINDOW if load in OVERLOADS else 1.0)


def lateness(log: Path, row: Mapping[str, Any], profile: str) -> dict[str, Any] | None:
    """Of the steps of a run; None, with a word about it, where the log or the profile does not tell."""
    begin, end = row["began_s"], row["began_s"] + row["run_s"]
    with log.open() as lines:
        steps = [step for step in read_steps(lines) if begin < step.ended <= end]
    try:
        return asdict(Lateness.of(steps, Profile.load(profile)))
    except ValueError as error:
        print(f"bench.headline: how late steps were is not known: {error}", file=sys.stderr)
        return None


def unlike(there: Mapping[Run, Made], reserve: float, window: float) -> Iterator[str]:
    """What sets runs apart from those of a server that reserves as much, with windows as long."""
    for run, (_, result) in there.items():
        if reserved(result) != reserve:
            yield f"{run.file} is of a server with --reserve {reserved(result):g}"
        if not math.isclose(result["window_s"], window_of(run.load, window), rel_tol=1e-4):
            yield f"{run.file} has a window of {result['window_s']:g} s"


# --- hosts -------------------------------------------------------------------------------------------------


def host(commit: str | None) -> dict[str, Any]:
    """What tells this host from others, and what it runs: client and server are both here."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "boot": boot.read_text()[:8] if boot.exists() else None,
        "driver": hardware.driver(),
        "versions": versions(hardware.PACKAGES),
        "commit": commit or checked_out(),
    }


def checked_out() -> str | None:
    """The commit of these files, marked if they are no longer its; None where git does not tell."""
    options = "--always", "--dirty", "--abbrev=12", "--exclude=*"
    git = ["git", "-C", str(pictures.ROOT), "describe", *options]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hosts(runs: Iterable[Made]) -> dict[str, list[Mapping[str, Any]]]:
    """By a letter, in order of time: the results that were made on the same host with the same versions."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in sorted((each.result for each in runs), key=lambda result: result["time"]):
        found.setdefault(described(result), []).append(result)
    return dict(zip(map(chr, itertools.count(ord("A"))), found.values(), strict=False))


def described(result: Mapping[str, Any]) -> str:
    """The host of a result, in words."""
    here, client = result["host"], result["client"]
    packages = ", ".join(f"{name} {each}" for name, each in here["versions"].items())
    return (
        f"{device_of(result['server'])} (driver {here['driver']}), {here['cores']} cores of {client['host']}"
        f" (boot {here['boot']}), {packages}, commit {here['commit']}"
    )


def said_of_hosts(runs: Iterable[Made]) -> str:
    lines: list[str] = []
    for letter, own in hosts(runs).items():
        python = [result["python_ms"] for result in own]
        fast = f"a loop of Python's in {min(python):.1f} to {max(python):.1f} ms"
        lines.append(f"{letter}: {described(own[0])}; {fast}; runs: {len(own)}")
    return "\n".join(lines)


# --- what it came to ---------------------------------------------------------------------------------------

MEANS = ("goodput_stage", "good_tokens_s", "raw_tokens_s", "mean_width", "e2e_p50_s", "refused")


class Summary(NamedTuple):
    """A policy at a load, over its seeds.

    over      taper's goodput with the same seeds, by the stage measure, over this policy's
    attained  requests within their targets, by the stage measure, as a share of all that arrived
    late      by seed: how many were not, be they late, refused or without an answer
    gap       the longest p99 gap between messages of a run, in TPOT targets
    hosts     letters, as `hosts` has them
    """

    load: Load
    policy: str
    seeds: Sequence[int]
    over: float | None
    attained: float | None
    late: Sequence[int]
    gap: float | None
    means: Mapping[str, float | None]
    hosts: str

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "load": str(self.load)}

    def line(self) -> str:
        seeds, late = (",".join(map(str, each)) for each in (self.seeds, self.late))
        over, attained, gap = (
            "-" if value is None else format(value, form)
            for value, form in ((self.over, ".2f"), (self.attained, ".1%"), (self.gap, ".2f"))
        )
        means = "".join(f"{COLUMNS[name].cell(value):>14}" for name, value in self.means.items())
        return f"{self.policy:<8}{seeds:>6}{over:>8}{attained:>10}{late:>10}{gap:>10}{means}  {self.hosts}"


TITLES = (
    f"{'policy':<8}{'seeds':>6}{'taper/':>8}{'attained':>10}{'late':>10}{'gap/TPOT':>10}{titles(MEANS)}  host"
)


def summaries(runs: Mapping[Run, Made]) -> Iterator[Summary]:
    """Of every load and policy that has a run."""
    letters = {id(result): letter for letter, own in hosts(runs.values()).items() for result in own}
    for load, policy in itertools.product(LOADS, (*RIVALS, *OTHERS)):
        own = {seed: runs[run] for seed in SEEDS if (run := Run(load, seed, policy)) in runs}
        if not own:
            continue
        arrived = sum(each.row["arrived"] for each in own.values())
        yield Summary(
            load=load,
            policy=policy,
            seeds=[*own],
            over=_over({seed: runs.get(Run(load, seed, "taper")) for seed in own}, own),
            attained=sum(each.good for each in own.values()) / arrived if arrived else None,
            late=[each.row["arrived"] - each.good for each in own.values()],
            gap=max((each.gap for each in own.values() if each.gap is not None), default=None),
            means={name: _mean(each.row[name] for each in own.values()) for name in MEANS},
            hosts="".join(sorted({letters[id(each.result)] for each in own.values()})),
        )


def _over(taper: Mapping[int, Made | None], own: Mapping[int, Made]) -> float | None:
    """The ratio of goodputs over the seeds that both have; None where there is none."""
    pairs = [
        (beside.row["goodput_stage"], own[seed].row["goodput_stage"])
        for seed, beside in taper.items()
        if beside is not None
    ]
    above, below = (sum(side) for side in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return above / below if below else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def table(runs: Mapping[Run, Made]) -> str:
    """For each load, every policy beside taper; then the hosts."""
    lines: list[str] = []
    for load, of_load in itertools.groupby(summaries(runs), lambda each: each.load):
        lines += [f"{load}", TITLES, *(each.line() for each in of_load)]
    return "\n".join([*lines, said_of_hosts(runs.values())])


# --- command line ------------------------------------------------------------------------------------------


def command() -> Command:
    parser = Command("bench.headline", "Compares policies on one server at all loads of docs/results.md.")
    add = parser.add_argument
    add("folder", type=Path, help="what holds the results")
    add("--minutes", type=float, default=0.0, help="that it may take, with the server's start")
    add("--part", type=part, default=(1, 1), metavar="K/N", help="every N-th of the runs, from the K-th on")
    add("--only", nargs="+", default=["*"], metavar="GLOB", help="runs whose files have such names")
    parser.add_window(warmup=30.0, window=30.0, cooldown=5.0, drain=300.0)
    add("--scale", type=float, default=1.0, help="factor of all lengths, for a small model")
    add(
        "--profile",
        default="h200-qwen3-32b",
        help="whose predictions steps are late beyond: a name, or a file",
    )
    add("--commit", help="what is checked out, where git does not tell")
    add("--plot", type=Path, help="the picture, over the simulated lines (needs matplotlib)")
    return parser


def part(text: str) -> tuple[int, int]:
    """Raises ValueError for anything but K/N with 1 <= K <= N."""
    number, of = map(int, text.split("/"))
    if not 1 <= number <= of:
        raise ValueError(text)
    return number, of


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, of_server = split(arguments)
    options = command().parse_args(own)
    options.until = clock() + 60.0 * options.minutes
    there = made(results(options.folder))
    missing = [each for each in plan() if each not in there]
    asked = [each for each in missing if any(fnmatch(each.file, glob) for glob in options.only)]
    wanted = asked[options.part[0] - 1 :: options.part[1]]
    say(f"{len(there)} runs are there, {len(missing)} are missing", options.json)
    if wanted and options.minutes:
        config = command_line.configured(of_server)
        if (other := next(unlike(there, config.reserve, options.window), None)) is not None:
            sys.exit(f"bench.headline: {other}")
        with started(of_server) as server:
            make(wanted, options, server, config)
    runs = made(results(options.folder))
    say(table(runs), options.json)
    found = {
        **head(command().typed(arguments)),
        "summaries": [each.as_json() for each in summaries(runs)],
        "missing": [str(each) for each in plan() if each not in runs],
    }
    write(found, options.json)
    if options.plot is not None:
        pictures.headline([pictures.LINES, *sorted(options.folder.glob("*.json"))], options.plot)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
