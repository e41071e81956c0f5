"""`taper-demo`: a real server, one answer that branches, and one load under three policies.

The server runs as a process of its own; everything here goes over gRPC. Requests, arrivals and seeds are the
same for every policy, so the tokens must be too: the demo fails if they are not. It does not assert which
policy wins, because that takes a quieter machine than this one may be.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.table import Table

from serve.answer import Completion, Delta, Event, StageStarted, WidthChanged
from serve.client import AsyncClient, Client, Options, Prompt, branch, parallel, serial, stopping
from serve.commands import Answer, summary

POLICIES = ("off", "eager", "taper")
SMOLLM2_FOLDER = Path("checkpoints/smollm2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Watch an answer branch, and compare admission policies on one load."""

    model: str = "default"
    """`default`, `smollm2` (fetched when first used), or whatever taper-serve serves."""
    requests: int = 48
    """Requests of the load."""
    seed: int = 0
    """Of the load's lengths and arrivals."""


def main(args: list[str] | None = None) -> None:
    """Console entry point."""
    demo = tyro.cli(Demo, prog="taper-demo", description=Demo.__doc__, args=args)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with running_server(_server_options(demo.model), console) as address:
        if demo.model == "smollm2":
            watch(address, *QUESTION, console=console)
            return
        watch(address, *SHOWCASE, console=console)
        runs = asyncio.run(compare(address, demo, console))
    disagreeing = {policy for policy in POLICIES if runs[policy].answers != runs[POLICIES[0]].answers}
    if disagreeing:
        sys.exit(f"taper-demo: the tokens under {', '.join(sorted(disagreeing))} differ from {POLICIES[0]}'s")
    console.print(f"All {demo.requests} requests got the same tokens under every policy.")


def _server_options(model: str) -> list[str]:
    if model != "smollm2":
        return ["--model", model, "--buckets", "1", "4", "8", "16", "32", "64"]
    if not (SMOLLM2_FOLDER / "config.json").exists():
        from model.smollm2 import convert

        convert(SMOLLM2_FOLDER)
    return ["--model", str(SMOLLM2_FOLDER), "--buckets", "4", "16", "64", "--max-context", "2048"]


@contextlib.contextmanager
def running_server(options: Sequence[str], console: Console) -> Iterator[str]:
    """Start taper-serve on a free loopback port, yield its address, and drain it at the end."""
    console.print("Starting taper-serve: it compiles one program per bucket and measures each …")
    started = time.monotonic()
    command = [str(Path(sys.executable).with_name("taper-serve")), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = server.stdout.readline()  # nothing else is printed before, and nothing if it fails
        if not ready:
            sys.exit("taper-demo: the server did not start; it says why above")
        address = ready.split()[-1]
        console.print(f"It serves on {address} after {time.monotonic() - started:.0f} s.\n")
        try:
            yield address
        finally:
            server.send_signal(signal.SIGTERM)


# --- one answer, watched -----------------------------------------------------------------------------------

SHOWCASE: tuple[str, Prompt, Options] = (
    "One request: a serial stage, six branches at once, a join (random weights: do not expect sense)",
    "The sun rises in the east. ",
    Options(
        plan=[
            serial(max_tokens=12),
            parallel(
                [
                    branch(f"\n{hour}:", label=hour, max_tokens=16 + 4 * i)
                    for i, hour in enumerate(("Dawn", "Morning", "Noon", "Afternoon", "Evening", "Night"))
                ],
                join="kv",
            ),
            serial("\nSo:", max_tokens=12),
        ],
    ),
)

QUESTION: tuple[str, Prompt, Options] = (
    "What should I know before I adopt a dog?",
    [{"role": "user", "content": "What should I know before I adopt a dog?"}],
    Options(
        plan=[
            parallel(
                [
                    branch("\n\nFood: A dog", label="food", max_tokens=48, stop=["\n"]),
                    branch("\n\nExercise: A dog", label="exercise", max_tokens=48, stop=["\n"]),
                    branch("\n\nHealth: A dog", label="health", max_tokens=48, stop=["\n"]),
                ],
                join="reprefill",
            ),
            serial("\n\nIn short,", max_tokens=48, stop=["\n"]),
        ],
    ),
)


def watch(address: str, title: str, prompt: Prompt, options: Options, console: Console) -> None:
    """Run one request; in a terminal its branches grow side by side, elsewhere they are shown at the end."""
    console.print(Rule(title))
    completion = Completion()
    with Client(address) as client, _view(completion, console) as refresh:
        for event in client.generate(prompt, **options):
            completion.add(event)
            if isinstance(event, Delta | StageStarted):
                refresh()
    console.print(summary(completion), style="dim")
    console.print()


@contextlib.contextmanager
def _view(completion: Completion, console: Console) -> Iterator[Callable[[], None]]:
    if not console.is_terminal:
        yield lambda: None
        console.print(Answer(completion))
        return
    with Live(Answer(completion), console=console, refresh_per_second=20) as live:
        yield lambda: live.update(Answer(completion))


# --- one load, three policies ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request of the load, and when it arrives in seconds."""

    at: float
    prompt: str
    options: Options
    forks: bool


@dataclass(slots=True)
class Measured:
    """A request as its client saw it: times in seconds since it was sent, and its tokens."""

    forks: bool
    completion: Completion = field(default_factory=Completion)
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    fork_tokens: int = 0
    fork_steps: float = 0.0
    width: int = 1

    def add(self, event: Event, elapsed: float) -> None:
        self.completion.add(event)
        if isinstance(event, WidthChanged):
            self.width = event.width
        elif isinstance(event, Delta):
            self.first = self.first or elapsed
            self.last = elapsed
            self.tokens += len(event.token_ids)
            if event.branch:
                self.fork_tokens += len(event.token_ids)
                self.fork_steps += len(event.token_ids) / self.width

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.tokens - 1)

    def answer(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(b.token_ids) for b in (self.completion.trunk, *self.completion.branches))


@dataclass(slots=True, kw_only=True)
class Run:
    """A load under one policy. `tpot` and `ttft` are the targets, in seconds."""

    measured: list[Measured]
    seconds: float
    steps: int
    tpot: float
    ttft: float

    @property
    def answers(self) -> list[tuple[tuple[int, ...], ...]]:
        return [each.answer() for each in self.measured]

    @property
    def good(self) -> list[Measured]:
        return [each for each in self.measured if each.tpot <= self.tpot and each.first <= self.ttft]

    def row(self) -> list[str]:
        serial_tpot = [1e3 * each.tpot for each in self.measured if not each.forks]
        forks = [each for each in self.measured if each.forks]
        return [
            f"{sum(each.tokens for each in self.good) / self.seconds:.0f}",
            f"{len(self.good) / len(self.measured):.0%}",
            f"{statistics.median(serial_tpot):.1f} / {max(serial_tpot):.1f}",
            f"{sum(e.fork_tokens for e in forks) / sum(e.fork_steps for e in forks):.2f}",
            f"{self.steps}",
            f"{self.seconds:.1f}",
        ]


COLUMNS = ("goodput tok/s", "attainment", "serial TPOT ms p50 / max", "mean width", "steps", "seconds")


async def compare(address: str, demo: Demo, console: Console) -> dict[str, Run]:
    """The same load under every policy, at targets that follow from this machine's own speed."""
    async with AsyncClient(address) as client:
        await client.set_policy("off")
        crowd = await play(client, [serial_job(0.0, index) for index in range(8)])
        tpot = 2 * statistics.median(each.tpot for each in crowd)
        ttft = 100 * tpot
        jobs = mixed_load(demo, spacing=3 * tpot, tpot=tpot, ttft=ttft)
        console.print(Rule(f"{demo.requests} requests, half of them with six branches, under three policies"))
        console.print(
            f"Targets: TPOT {1e3 * tpot:.1f} ms, twice what 8 serial requests together get here;"
            f" TTFT {1e3 * ttft:.0f} ms."
        )
        table = Table("policy", *COLUMNS)
        runs: dict[str, Run] = {}
        for policy in POLICIES:
            await client.set_policy(policy)
            steps, started = (await client.load()).steps, time.monotonic()
            measured = await play(client, jobs)
            seconds = time.monotonic() - started
            steps = (await client.load()).steps - steps
            runs[policy] = Run(measured=measured, seconds=seconds, steps=steps, tpot=tpot, ttft=ttft)
            table.add_row(policy, *runs[policy].row())
        console.print(table)
    return runs


def serial_job(at: float, index: int, **slo: float) -> Job:
    options = Options(plan=[serial(stopping=stopping(40, ignore_eos=True))], token_ids=True, **slo)  # type: ignore[typeddict-item]
    return Job(at=at, prompt=f"Request {index}: the rain falls on the hills. ", options=options, forks=False)


def forking_job(at: float, index: int, lengths: Sequence[int], **slo: float) -> Job:
    branches = [
        branch(f"\n{i}:", stopping=stopping(length, ignore_eos=True)) for i, length in enumerate(lengths)
    ]
    plan = [
        serial(stopping=stopping(8, ignore_eos=True)),
        parallel(branches, join="kv"),
        serial("\nAll:", stopping=stopping(8, ignore_eos=True)),
    ]
    options = Options(plan=plan, token_ids=True, **slo)  # type: ignore[typeddict-item]
    return Job(at=at, prompt=f"Request {index}: the rivers run to the sea. ", options=options, forks=True)


def mixed_load(demo: Demo, *, spacing: float, tpot: float, ttft: float) -> list[Job]:
    """Poisson arrivals, on average `spacing` seconds apart; every second request forks."""
    rng = random.Random(demo.seed)
    slo = {"tpot_slo_ms": 1e3 * tpot, "ttft_slo_ms": 1e3 * ttft}
    jobs: list[Job] = []
    at = 0.0
    for index in range(demo.requests):
        if index % 2:
            jobs.append(forking_job(at, index, [rng.randint(12, 32) for _ in range(6)], **slo))
        else:
            jobs.append(serial_job(at, index, **slo))
        at += rng.expovariate(1 / spacing)
    return jobs


async def play(client: AsyncClient, jobs: Sequence[Job]) -> list[Measured]:
    """Send every job at its time and measure it from outside."""

    async def one(job: Job) -> Measured:
        measured = Measured(job.forks)
        await asyncio.sleep(job.at)
        sent = time.monotonic()
        async for event in client.generate(job.prompt, **job.options):
            measured.add(event, time.monotonic() - sent)
        return measured

    return await asyncio.gather(*(one(job) for job in jobs))


if __name__ == "__main__":
    main()
