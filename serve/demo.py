"""`taper-demo`: a real server, one answer that branches, and one load of questions under three policies.

The server runs as a process of its own; everything here goes over gRPC. The embedded model forks by itself,
and its answers can be checked. Questions and arrivals are the same for every policy, so the tokens must be
too: the demo fails if they are not. It does not assert which policy wins, because that takes a quieter
machine than this one may be.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.table import Table

from model.tiny.layout import lay_out
from model.tiny.lessons import tokenizer
from model.tiny.tasks import Fork, Task, transcript, write_task
from serve.client.answer import Completion, Delta, Event, StageStarted, WidthChanged
from serve.client.client import AsyncClient, Client, Options, Prompt, branch, model_driven, parallel, serial
from serve.commands import Answer, summary

POLICIES = ("off", "eager", "taper")
SIX_PART_QUESTIONS = 200
SPEED_TURNS = 3
CROWD = 8
SMOLLM2_FOLDER = Path("checkpoints/smollm2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Watch an answer branch, and compare admission policies on one load."""

    model: Literal["default", "smollm2"] = "default"
    """`default`, or `smollm2`, which is fetched when first used and answers one question."""
    requests: int = 48
    """Questions of the load; every second one has independent parts."""
    seed: int = 3_000_017
    """Of the questions, which training has not seen, and of their arrivals."""


def main(args: list[str] | None = None) -> None:
    """Console entry point."""
    demo = tyro.cli(Demo, prog="taper-demo", description=Demo.__doc__, args=args)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with running_server(_server_options(demo.model), console) as address:
        if demo.model == "smollm2":
            watch(address, ADVICE, "What should I know before I adopt a dog?", console)
            return
        show_speed(address, demo, console)
        runs = asyncio.run(compare(address, demo, console))
    disagreeing = {policy for policy in POLICIES if runs[policy].answers != runs[POLICIES[0]].answers}
    if disagreeing:
        sys.exit(f"taper-demo: the tokens under {', '.join(sorted(disagreeing))} differ from {POLICIES[0]}'s")
    right = runs[POLICIES[0]].right
    console.print(
        f"The same tokens under every policy; {right} of {demo.requests} answers are right to the letter."
    )


BY_ITSELF = Options(plan=model_driven(max_tokens=448, branch_max_tokens=300))


def chat(question: str) -> Prompt:
    return [{"role": "user", "content": question}]


def questions(seed: int) -> Iterator[Task]:
    """Questions of a kind that the default model was taught, but has not seen."""
    return (write_task(seed, index, held_out=True) for index in itertools.count())


def parts(task: Task) -> int:
    """Branches that the right answer opens at its first fork; 0 if it does not fork."""
    return next((len(part.branches) for part in task.answer if isinstance(part, Fork)), 0)


def gain(task: Task) -> float:
    """Tokens of the right answer for each position that it takes: what its branches can win at most."""
    laid_out = lay_out("", task.answer, tokenizer().encode)
    return len(laid_out.tokens) / (1 + max(laid_out.positions))


def watched_question(seed: int) -> Task:
    """Of many questions with six parts, the one whose branches can win most."""
    six = (task for task in questions(seed) if parts(task) == 6)
    return max(itertools.islice(six, SIX_PART_QUESTIONS), key=gain)


def _server_options(model: str) -> list[str]:
    if model != "smollm2":
        return ["--buckets", "1", "4", "8", "16", "32"]
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

ADVICE = Options(
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
)


def watch(address: str, options: Options, question: str, console: Console) -> Completion:
    """Ask one question; in a terminal its branches grow side by side, elsewhere they are shown at the end."""
    console.print(Rule(question))
    completion = Completion()
    with Client(address) as client, _view(completion, console) as refresh:
        for event in client.generate(chat(question), **options):
            completion.add(event)
            if isinstance(event, Delta | StageStarted):
                refresh()
    console.print(summary(completion), style="dim")
    return completion


def show_speed(address: str, demo: Demo, console: Console) -> None:
    """One question with six parts, watched; then with branches and without, in turns."""
    task = watched_question(demo.seed)
    seconds: dict[str, list[float]] = {"eager": [], "off": []}
    with Client(address) as client:
        client.set_policy("eager")
        watch(address, BY_ITSELF, task.question, console)
        for _ in range(SPEED_TURNS):
            for policy, measured in seconds.items():
                client.set_policy(policy)
                measured.append(client.complete(chat(task.question), **BY_ITSELF).timing.total)
    branched, serial = (statistics.median(measured) for measured in seconds.values())
    console.print(
        f"Again, {SPEED_TURNS} times each in turns, medians: {branched:.2f} s with all branches at once,"
        f" {serial:.2f} s with one at a time: {serial / branched:.1f} times as long."
    )
    console.print(
        f"(Of {SIX_PART_QUESTIONS} questions with six parts, it has most to win: {gain(task):.1f} tokens for"
        " each position on its longest path.)\n"
    )


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
    """A question of the load, and when it arrives in seconds."""

    at: float
    task: Task
    options: Options


@dataclass(slots=True)
class Measured:
    """A question as its asker saw it answered: times in seconds since it was sent."""

    task: Task
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

    @property
    def right(self) -> bool:
        """Whether everything that every branch said is right, to the letter."""
        branches = {each.id: each for each in (self.completion.trunk, *self.completion.branches)}

        def name(number: int) -> tuple[str, ...]:
            each = branches[number]
            return (*name(each.parent), each.label) if number else ()

        return {name(number): each.text for number, each in branches.items()} == transcript(self.task.answer)

    def tokens_by_label(self) -> dict[tuple[int, str], list[tuple[int, ...]]]:
        """What every branch said, whatever the order in which branches were opened."""
        said: dict[tuple[int, str], list[tuple[int, ...]]] = {}
        for each in (self.completion.trunk, *self.completion.branches):
            said.setdefault((each.parent > 0, each.label), []).append(tuple(each.token_ids))
        return {label: sorted(all_said) for label, all_said in said.items()}


@dataclass(slots=True, kw_only=True)
class Run:
    """A load under one policy. `tpot` and `ttft` are the targets, in seconds."""

    measured: list[Measured]
    seconds: float
    steps: int
    tpot: float
    ttft: float

    @property
    def answers(self) -> list[dict[tuple[int, str], list[tuple[int, ...]]]]:
        return [each.tokens_by_label() for each in self.measured]

    @property
    def right(self) -> int:
        return sum(each.right for each in self.measured)

    @property
    def good(self) -> list[Measured]:
        return [each for each in self.measured if each.tpot <= self.tpot and each.first <= self.ttft]

    @property
    def serial_tpot(self) -> list[float]:
        """Of the answers without independent parts, in seconds."""
        return [each.tpot for each in self.measured if not parts(each.task)]

    def row(self) -> list[str]:
        serial_ms = [1e3 * tpot for tpot in self.serial_tpot]
        forks = [each for each in self.measured if parts(each.task)]
        return [
            f"{sum(each.tokens for each in self.good) / self.seconds:.0f}",
            f"{len(self.good) / len(self.measured):.0%}",
            f"{self.right} of {len(self.measured)}",
            f"{statistics.median(serial_ms):.1f} / {max(serial_ms):.1f}",
            f"{sum(e.fork_tokens for e in forks) / sum(e.fork_steps for e in forks):.2f}",
            f"{self.steps}",
            f"{self.seconds:.1f}",
        ]


COLUMNS = (
    "goodput tok/s",
    "attainment",
    "right",
    "serial TPOT ms p50 / max",
    "mean width",
    "steps",
    "seconds",
)


async def compare(address: str, demo: Demo, console: Console) -> dict[str, Run]:
    """The same load under every policy, at targets that follow from this machine's own speed."""
    async with AsyncClient(address) as client:
        await client.set_policy("off")
        crowd = await play(client, mixed_load(replace(demo, requests=CROWD, seed=demo.seed + 1), spacing=0.0))
        tpot = 2 * statistics.quantiles([each.tpot for each in crowd], n=4)[2]
        ttft = 100 * tpot
        spacing = statistics.mean(each.last for each in crowd) / CROWD
        jobs = mixed_load(demo, spacing=spacing, tpot_slo_ms=1e3 * tpot, ttft_slo_ms=1e3 * ttft)
        console.print(
            Rule(f"{demo.requests} questions, half of them with independent parts, under three policies")
        )
        console.print(
            f"Targets by rule: TPOT {1e3 * tpot:.1f} ms, twice the upper quartile of {CROWD} such questions"
            f" at once, under off; TTFT {1e3 * ttft:.0f} ms, 100 times that. A question comes every"
            f" {1e3 * spacing:.0f} ms on average, the crowd's mean time for an answer by {CROWD}."
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
        console.print(_knee(runs["eager"]))
    return runs


def _knee(eager: Run) -> str:
    """Whether it cost others their target that every branch was admitted."""
    slowed = sum(tpot > eager.tpot for tpot in eager.serial_tpot)
    if slowed:
        return (
            f"With every branch admitted, {slowed} serial answers missed their TPOT: taper is there for them."
        )
    return (
        "No knee here: with every branch admitted, no serial answer missed its TPOT. Steps of many rows cost"
        " this machine hardly more than steps of few, so taper has nothing to hold back."
    )


def job(task: Task, at: float, **slo: float) -> Job:
    options = Options(**BY_ITSELF, token_ids=True, **slo)  # type: ignore[typeddict-item]
    return Job(at=at, task=task, options=options)


def mixed_load(demo: Demo, *, spacing: float, **slo: float) -> list[Job]:
    """Poisson arrivals, on average `spacing` seconds apart; every second answer forks."""
    rng = random.Random(demo.seed)
    whole = (task for task in questions(demo.seed) if not parts(task))
    parted = (task for task in questions(demo.seed) if parts(task))
    jobs: list[Job] = []
    at = 0.0
    for index in range(demo.requests):
        jobs.append(job(next(parted if index % 2 else whole), at, **slo))
        at += spacing * rng.expovariate(1.0)
    return jobs


async def play(client: AsyncClient, jobs: Sequence[Job]) -> list[Measured]:
    """Send every job at its time and measure it from outside."""

    async def one(job: Job) -> Measured:
        measured = Measured(job.task)
        await asyncio.sleep(job.at)
        sent = time.monotonic()
        async for event in client.generate(chat(job.task.question), **job.options):
            measured.add(event, time.monotonic() - sent)
        return measured

    return await asyncio.gather(*(one(job) for job in jobs))


if __name__ == "__main__":
    main()
