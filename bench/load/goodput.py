"""Compares admission policies on one running server: the same requests at the same times, one after another.

    python -m bench.load.goodput --address HOST:PORT --workload headline --rates 0.8,1.6 --json OUT --plot PNG
    python -m bench.load.goodput --workload headline-closed --seeds 1,2,3 --json OUT -- --model qwen3-32b ...

What follows `--` are arguments of a taper-serve that is started for it. Between two runs the server is
drained. Requests that arrive within the window are measured, all of them, and served to their end, or count
as not finished `--drain` seconds after it; those before it warm the server up, those after it keep up the
load. No run finds another's prompts in the server's cache. Measures are those of bench.load.measures, by the
client's clock: an open loop's request has arrived when it was due.

Targets follow by rule: TTFT 5 s; TPOT twice what one request alone (800 + 400 tokens) gets first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import result
from bench.command import Command, floats, ints, names, split
from bench.load.driver import Driver, connected
from bench.load.measures import Window, cells, titles
from bench.load.trial import Setting, Trial, drained, unloaded_tpot
from bench.load.workload import ARRIVALS, TPOT_SLO_MULTIPLE, Workload, named
from bench.plot import plot_policies
from bench.server import started
from bench.timing import clock, python_ms
from scheduler.request import Slo
from serve.config import command_line
from serve.lateness import CAUSES
from taper_client import AsyncClient
from taper_client.errors import ServiceError

POLICIES = "off,cap:2,cap:4,cap:6,cap:8,eager,taper"


@dataclass(slots=True)
class Comparison:
    """Runs every policy at every point, and holds what there is so far."""

    options: argparse.Namespace
    found: dict[str, Any]
    deadline: float

    async def run(self, address: str, metrics_url: str | None) -> None:
        options = self.options
        async with AsyncClient(address) as client, connected(address) as driver:
            server = self.found["server"] = await result.describe_server(client)
            vocab_size = server["vocab_size"]
            slo = await self._targets(client, driver, vocab_size)
            self.say(result.ran_on(self.found))
            self.say(f"Targets: TPOT {1e3 * slo.tpot:.1f} ms, TTFT {slo.ttft:g} s\n{TITLES}")
            for load, seed, workload in points(options):
                setting = Setting(
                    workload=workload,
                    slo=slo,
                    window=Window(options.warmup, options.warmup + options.window, options.drain),
                    vocab_size=vocab_size,
                    fork=options.fork,
                )
                point = {"load": load, "seed": seed}
                closed = workload.clients is not None
                described = {"closed": closed, "sha256": workload.digest, "statistics": workload.statistics()}
                self.found["points"].append(point | described)
                for policy in options.policies:
                    await self._policy(client, driver, setting, {**point, "policy": policy}, metrics_url)
            await client.set_policy(server["policy"])

    def say(self, text: str) -> None:
        result.say(text, self.options.json)

    async def _targets(self, client: AsyncClient, driver: Driver, vocab_size: int) -> Slo:
        tpot = self.options.tpot_slo
        if tpot is None:
            await client.set_policy("off")
            alone = await unloaded_tpot(driver, vocab_size)
            self.found["unloaded_tpot_ms"] = 1e3 * alone
            tpot = TPOT_SLO_MULTIPLE * alone
        self.found |= {"tpot_slo_ms": 1e3 * tpot, "ttft_slo_s": self.options.ttft_slo}
        return Slo(tpot=tpot, ttft=self.options.ttft_slo, reject=self.options.reject_late)

    async def _policy(
        self, client: AsyncClient, driver: Driver, setting: Setting, point: dict[str, Any], url: str | None
    ) -> None:
        began, moment = clock(), time.monotonic()
        trial, whole = Trial(setting, point["policy"]), False
        left = self.deadline - began
        if left > setting.window.end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if math.isfinite(left) else None):
                    await client.set_policy(trial.policy)
                    await trial.play(driver, url)
                    whole = True
            await drained(client)
        if not whole:
            self.found["left_out"].append(point)
            self.say(f"left out for want of time: {trial.policy} at {point['load']}, seed {point['seed']}")
            return
        row = {**point, **trial.row(), "began_s": moment, "run_s": clock() - began}
        self.found["rows"].append(row)
        self.say(line(row))
        result.keep(self.found, self.options.json)


def points(options: argparse.Namespace) -> Iterator[tuple[float | None, int, Workload]]:
    """(requests per second or clients, seed, workload), seeds innermost; a file is one point."""
    seconds = options.warmup + options.window + options.cooldown
    loads: list[dict[str, Any]] = [{}]
    if options.rates:
        loads = [{"rate": rate} for rate in options.rates]
    elif options.clients:
        loads = [{"clients": clients} for clients in options.clients]
    for load in loads:
        for seed in options.seeds:
            workload = named(options.workload, seed, seconds, arrivals=options.arrivals, **load)
            workload = workload.scaled(options.scale)
            yield workload.rate or workload.clients, workload.seed, workload


# --- command line ------------------------------------------------------------------------------------------

FIGURES = (
    "goodput_stage", "attainment_stage", "serial_attainment", "parallel_attainment", "ttft_attainment",
    "refused", "goodput_mean", "goodput_critical", "raw_tokens_s", "good_tokens_s", "mean_width", "e2e_p50_s",
    "e2e_p99_s", "gap_p99_ms",
    *(f"late_{cause}" for cause in CAUSES),
)  # fmt: skip
TITLES = f"{'load':>6}{'seed':>5}  {'policy':<8}{titles(FIGURES)}"


def line(row: Mapping[str, Any]) -> str:
    load = "-" if row["load"] is None else f"{row['load']:g}"
    return f"{load:>6}{row['seed']:>5}  {row['policy']:<8}{cells(row, FIGURES)}"


def command() -> Command:
    parser = Command("bench.load.goodput", "Compares policies on one server.")
    add = parser.add_argument
    add("--address", help="HOST:PORT of a running server, instead of arguments for one after --")
    add("--metrics-url", help="its Prometheus page, for what it says of itself")
    add("--workload", default="headline", help="headline, headline-closed, a family, or a workload file")
    add("--rates", type=floats, help="requests per second of an open loop, one point each")
    add("--clients", type=ints, help="clients of a closed loop, one point each")
    add("--arrivals", choices=ARRIVALS, help="of an open loop")
    add("--scale", type=float, default=1.0, help="factor of all lengths, for a small model")
    add("--policies", type=names, default=names(POLICIES), metavar="NAME,NAME,...")
    add("--seeds", type=ints, default=[1], metavar="N,N,...")
    add("--fork", choices=["server", "client"], default="server", help="who branches and joins answers")
    add("--reject-late", action="store_true", help="requests would rather be refused than late")
    add("--tpot-slo", type=_auto, help="seconds, or auto: twice the unloaded TPOT")
    add("--ttft-slo", type=float, default=5.0, help="seconds")
    parser.add_window(warmup=45.0, window=45.0, cooldown=15.0, drain=600.0)
    add("--budget-seconds", type=float, default=math.inf, help="start no run that would end later")
    add("--plot", type=Path, help="goodput and attainment against load (needs matplotlib)")
    return parser


def _auto(text: str) -> float | None:
    return None if text == "auto" else float(text)


def compare(options: argparse.Namespace, typed: str, address: str, url: str | None) -> dict[str, Any]:
    """All that was measured, also where it was interrupted."""
    times = {f"{name}_s": getattr(options, name) for name in ("warmup", "window", "cooldown", "drain")}
    asked = {name: getattr(options, name) for name in ("workload", "fork", "reject_late", "scale")}
    head = {**result.head(typed), "python_ms": python_ms()}
    found: dict[str, Any] = {**head, **asked, **times, "points": [], "rows": [], "left_out": []}
    try:
        asyncio.run(Comparison(options, found, clock() + options.budget_seconds).run(address, url))
    except (KeyboardInterrupt, ServiceError) as stopped:
        if not found["rows"]:
            raise
        found["stopped"] = repr(stopped)
        print(
            f"bench.load.goodput: stopped by {stopped!r}; what was measured before is kept", file=sys.stderr
        )
    return found


def main(arguments: Sequence[str]) -> dict[str, Any]:
    own, of_server = split(arguments)
    options, typed = command().parse_args(own), command().typed(arguments)
    try:
        if options.address:
            found = compare(options, typed, options.address, options.metrics_url)
        else:
            reserve = command_line.configured(of_server).reserve
            with started(of_server) as server:
                found = compare(options, typed, server.address, server.metrics_url) | {"reserve": reserve}
    except (ServiceError, OSError, ValueError) as error:
        sys.exit(f"bench.load.goodput: {error}")
    result.write(found, options.json)
    if options.plot is not None:
        plot_policies(found, options.plot)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
