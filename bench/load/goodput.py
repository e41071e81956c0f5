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
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import result
from bench.arguments import split
from bench.load.driver import (
    Answer,
    Driver,
    Reply,
    clock,
    connected,
    message,
    no_collections,
    sleep_until,
)
from bench.load.measures import client_row, quantile
from bench.load.workload import ARRIVALS, Item, Workload, named
from bench.plot import plot_policies
from scheduler.request import Slo
from serve.api.errors import ServiceError
from serve.client.client import AsyncClient

POLICIES = "off,cap:2,cap:4,cap:6,cap:8,eager,taper"
TPOT_SLO_MULTIPLE = 2.0
ALONE = Item(0.0, 800, ((400,),))
SERVER = "from serve.commands import serve; serve()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every policy. Times in seconds; requests that arrive in [warmup, end) count."""

    workload: Workload
    slo: Slo
    warmup: float
    end: float
    drain: float
    vocab_size: int

    @property
    def window(self) -> float:
        return self.end - self.warmup


# --- one policy --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """A workload played once. Replies are in order of the workload's items, as far as these were sent."""

    setting: Setting
    policy: str
    start: float = math.nan
    replies: list[Reply] = field(default_factory=list)
    cpu_share: float = math.nan
    server: dict[str, float | None] = field(default_factory=dict)
    _calls: list[asyncio.Task[None]] = field(default_factory=list)
    _window_sent: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(self, driver: Driver, metrics_url: str | None) -> None:
        """Serve until every request of the window is answered, then give up the others."""
        setting = self.setting
        requests = self._messages()
        with no_collections():
            cpu, self.start = time.process_time(), clock()
            async with asyncio.TaskGroup() as group:
                senders = [group.create_task(sender) for sender in self._senders(group, driver, requests)]
                await sleep_until(self.start + setting.warmup)
                before = await asyncio.to_thread(scrape, metrics_url)
                await sleep_until(self.start + setting.end)
                after = await asyncio.to_thread(scrape, metrics_url)
                self.server = server_row(before, after)
                await self._window_sent.wait()
                ran_dry = setting.workload.clients is not None and len(self.replies) == len(requests)
                pending = [self._calls[index] for index in self.measured]
                if pending:
                    await asyncio.wait(pending, timeout=setting.drain)
                for task in (*senders, *self._calls):
                    task.cancel()
            if ran_dry:
                raise ValueError(f"{len(requests)} requests do not last for a window of {setting.window:g} s")
            self.cpu_share = (time.process_time() - cpu) / (clock() - self.start)

    @property
    def measured(self) -> list[int]:
        """The requests that arrived within the window."""
        window = self.setting.warmup, self.setting.end
        return [i for i, reply in enumerate(self.replies) if window[0] <= reply.due - self.start < window[1]]

    def _messages(self) -> list[bytes]:
        salt, setting = uuid.uuid4().hex, self.setting
        return [
            message(item, f"{salt}-{index}", index, setting.vocab_size, slo=setting.slo, salt=salt)
            for index, item in enumerate(setting.workload.items)
        ]

    def _senders(self, group: asyncio.TaskGroup, driver: Driver, requests: Sequence[bytes]) -> list[Any]:
        items, left = self.setting.workload.items, iter(requests)

        def send(request: bytes, due: float) -> asyncio.Task[None]:
            self.replies.append(Reply(due))
            self._calls.append(group.create_task(driver.ask(request, self.replies[-1])))
            return self._calls[-1]

        async def open_loop() -> None:
            for item, request in zip(items, left, strict=True):
                if item.arrival >= self.setting.end:
                    self._window_sent.set()
                due = self.start + item.arrival
                await sleep_until(due)
                send(request, due)
            self._window_sent.set()

        async def client() -> None:
            self._window_sent.set()  # what is sent now is due now
            for request in left:
                await asyncio.wait([send(request, clock())])

        clients = self.setting.workload.clients
        return [open_loop()] if clients is None else [client() for _ in range(clients)]

    def row(self) -> dict[str, Any]:
        """The policy's measures; None for a ratio with nothing below."""
        setting, items = self.setting, self.setting.workload.items
        answers = [Answer.of(reply) for reply in self.replies]
        records = [answers[i].record(items[i], self.replies[i].due) for i in self.measured]
        window = [
            emission
            for answer in answers
            for emission in answer.emissions
            if setting.warmup <= emission.at - self.start < setting.end
        ]
        tokens, steps = (sum(getattr(emission, name) for emission in window) for name in ("tokens", "steps"))
        measures = client_row(records, setting.window, tpot_slo=setting.slo.tpot, ttft_slo=setting.slo.ttft)
        good = {
            f"good_requests_s_{name}": (measures[f"attainment_{name}"] or 0.0) * len(records) / setting.window
            for name in ("mean", "stage", "critical")
        }
        gaps = [gap for i in self.measured for gap in answers[i].gaps]
        lags = [self.replies[i].sent - self.replies[i].due for i in self.measured]
        errors = Counter(self.replies[i].error for i in self.measured if self.replies[i].error)
        return {
            "policy": self.policy,
            **measures,
            "raw_tokens_s": tokens / setting.window,
            "mean_width": tokens / steps if steps else None,
            **good,
            "gap_p99_ms": _milliseconds(quantile(gaps, 0.99)),
            "arrived": len(records),
            "finished": sum(record.finished for record in records),
            "errors": errors,
            "server": self.server,
            "client_cpu_share": self.cpu_share,
            "send_lag_p99_ms": _milliseconds(quantile(lags, 0.99)),
        }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


# --- what the server says of itself ------------------------------------------------------------------------


def scrape(url: str | None) -> dict[str, float]:
    """The values of a Prometheus page by name and labels; none without a page."""
    if url is None:
        return {}
    with urllib.request.urlopen(url, timeout=30) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name.removeprefix("taper_"): float(value) for name, value in pairs}


def server_row(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float | None]:
    """Of each histogram the mean, of each counter the increase between two scrapes; gauges as they ended."""
    found: dict[str, float | None] = {}
    for name, value in after.items():
        family, brace, labels = name.partition("{")
        change = value - before.get(name, 0.0)
        if family.endswith("_sum"):
            base = family.removesuffix("_sum")
            count = f"{base}_count{brace}{labels}"
            observed = after[count] - before.get(count, 0.0)
            found[base + brace + labels] = change / observed if observed else None
        elif family.endswith(("_total", "_count")):
            found[name] = change
        elif not family.endswith(("_bucket", "_created")):
            found[name] = value if math.isfinite(value) else None
    return found


# --- all of them -------------------------------------------------------------------------------------------


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
            self.say(f"Targets: TPOT {1e3 * slo.tpot:.1f} ms, TTFT {slo.ttft:g} s\n{TITLES}")
            for load, seed, workload in points(options):
                setting = Setting(
                    workload=workload,
                    slo=slo,
                    warmup=options.warmup,
                    end=options.warmup + options.window,
                    drain=options.drain,
                    vocab_size=vocab_size,
                )
                point = {"load": load, "seed": seed}
                closed = workload.clients is not None
                described = {"closed": closed, "sha256": workload.digest, "statistics": workload.statistics()}
                self.found["points"].append(point | described)
                for policy in options.policies:
                    await self._policy(client, driver, setting, {**point, "policy": policy}, metrics_url)
            await client.set_policy(server["policy"])

    def say(self, text: str) -> None:
        print(text, file=sys.stderr if self.options.json == "-" else sys.stdout, flush=True)

    async def _targets(self, client: AsyncClient, driver: Driver, vocab_size: int) -> Slo:
        tpot = self.options.tpot_slo
        if tpot is None:
            await client.set_policy("off")
            alone = await unloaded_tpot(driver, vocab_size)
            self.found["unloaded_tpot_ms"] = 1e3 * alone
            tpot = TPOT_SLO_MULTIPLE * alone
        self.found |= {"tpot_slo_ms": 1e3 * tpot, "ttft_slo_s": self.options.ttft_slo}
        return Slo(tpot=tpot, ttft=self.options.ttft_slo)

    async def _policy(
        self, client: AsyncClient, driver: Driver, setting: Setting, point: dict[str, Any], url: str | None
    ) -> None:
        began, run, whole = clock(), Run(setting, point["policy"]), False
        left = self.deadline - began
        if left > setting.end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if math.isfinite(left) else None):
                    await client.set_policy(run.policy)
                    await run.play(driver, url)
                    whole = True
            await drained(client)
        if not whole:
            self.found["left_out"].append(point)
            self.say(f"left out for want of time: {run.policy} at {point['load']}, seed {point['seed']}")
            return
        row = {**point, **run.row(), "run_s": clock() - began}
        self.found["rows"].append(row)
        self.say(line(row))
        if self.options.json != "-":
            result.write(self.found, self.options.json)


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


async def unloaded_tpot(driver: Driver, vocab_size: int) -> float:
    """Seconds per token of one serial request that is served alone. Raises ServiceError if it fails."""
    salt = uuid.uuid4().hex

    async def one(seed: int) -> float:
        reply = Reply(clock())
        await driver.ask(message(ALONE, f"{salt}-{seed}", seed, vocab_size, salt=salt), reply)
        record = Answer.of(reply).record(ALONE, reply.due)
        if not record.finished:
            raise ServiceError(f"a request of {ALONE.prompt} + {ALONE.tokens} tokens failed: {reply.error}")
        return record.mean_tpot

    await one(0)  # warms the server up
    return await one(1)


async def drained(client: AsyncClient) -> None:
    """Once nothing runs or waits."""
    while (load := await client.load()).running_requests or load.queued_requests:
        await asyncio.sleep(0.02)


# --- command line ------------------------------------------------------------------------------------------

COLUMNS = {
    "goodput_stage": ("goodput stage", "{:.0f}"),
    "attainment_stage": ("attained", "{:.1%}"),
    "serial_attainment": ("serial", "{:.1%}"),
    "parallel_attainment": ("parallel", "{:.1%}"),
    "ttft_attainment": ("TTFT", "{:.1%}"),
    "goodput_mean": ("goodput mean", "{:.0f}"),
    "goodput_critical": ("critical", "{:.0f}"),
    "raw_tokens_s": ("raw tok/s", "{:.0f}"),
    "mean_width": ("width", "{:.2f}"),
    "e2e_p50_s": ("E2E p50 s", "{:.2f}"),
    "e2e_p99_s": ("E2E p99 s", "{:.2f}"),
    "gap_p99_ms": ("gap p99 ms", "{:.1f}"),
}
TITLES = f"{'load':>6}{'seed':>5}  {'policy':<8}" + "".join(f"{title:>14}" for title, _ in COLUMNS.values())


def line(row: Mapping[str, Any]) -> str:
    cells = ("-" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items())
    load = "-" if row["load"] is None else f"{row['load']:g}"
    return f"{load:>6}{row['seed']:>5}  {row['policy']:<8}" + "".join(f"{cell:>14}" for cell in cells)


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The address and metrics page of a taper-serve that runs as long as this context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "--port", "0", "--metrics-port", str(port), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        echo = threading.Thread(target=sys.stderr.writelines, args=(server.stdout,))
        try:
            for said in server.stdout:
                print(said, end="", file=sys.stderr)
                if said.startswith("taper-serve ready on "):
                    break
            else:
                sys.exit("bench.load.goodput: the server did not start; it says why above")
            echo.start()
            yield said.split()[-1], f"http://127.0.0.1:{port}/metrics"
        finally:
            server.terminate()
            if echo.ident is not None:
                echo.join()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load.goodput", description="Compares policies on one server."
    )
    add = parser.add_argument
    add("--address", help="HOST:PORT of a running server, instead of arguments for one after --")
    add("--metrics-url", help="its Prometheus page, for what it says of itself")
    add("--workload", default="headline", help="headline, headline-closed, a family, or a workload file")
    add("--rates", type=_floats, help="requests per second of an open loop, one point each")
    add("--clients", type=_ints, help="clients of a closed loop, one point each")
    add("--arrivals", choices=ARRIVALS, help="of an open loop")
    add("--scale", type=float, default=1.0, help="factor of all lengths, for a small model")
    add("--policies", type=_names, default=_names(POLICIES), metavar="NAME,NAME,...")
    add("--seeds", type=_ints, default=[1], metavar="N,N,...")
    add("--tpot-slo", type=_auto, help="seconds, or auto: twice the unloaded TPOT")
    add("--ttft-slo", type=float, default=5.0, help="seconds")
    add("--warmup", type=float, default=45.0, help="seconds before the window")
    add("--window", type=float, default=45.0, help="seconds in which requests count")
    add("--cooldown", type=float, default=15.0, help="seconds of arrivals after it")
    add("--drain", type=float, default=600.0, help="seconds after the window that its requests get")
    add("--budget-seconds", type=float, default=math.inf, help="start no run that would end later")
    add("--json", help="a file, written anew after each run, or - for standard output")
    add("--plot", type=Path, help="goodput and attainment against load (needs matplotlib)")
    return parser


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def _auto(text: str) -> float | None:
    return None if text == "auto" else float(text)


def compare(options: argparse.Namespace, command: str, address: str, url: str | None) -> dict[str, Any]:
    """All that was measured, also where it was interrupted."""
    times = {f"{name}_s": getattr(options, name) for name in ("warmup", "window", "cooldown", "drain")}
    asked = {"workload": options.workload, "scale": options.scale, **times}
    found: dict[str, Any] = {**result.head(command), **asked, "points": [], "rows": [], "left_out": []}
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
    options = parser().parse_args(own)
    command = f"python -m bench.load.goodput {shlex.join(arguments)}"
    try:
        if options.address:
            found = compare(options, command, options.address, options.metrics_url)
        else:
            with served(of_server) as (address, url):
                found = compare(options, command, address, url)
    except (ServiceError, OSError, ValueError) as error:
        sys.exit(f"bench.load.goodput: {error}")
    result.write(found, options.json)
    if options.plot is not None:
        plot_policies(found, options.plot)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
