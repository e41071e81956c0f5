"""`taper-demo`: a real server, one answer that branches, and one load of questions under three policies.

The server runs as a process of its own; everything here goes over gRPC. The embedded model forks by itself,
and its answers can be checked. Questions and arrivals are the same for every policy, so the tokens must be
too: the demo fails if they are not. It does not assert which policy wins, because that takes a quieter
machine than this one may be.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from bench.load import driver
from bench.load.driver import Driver, connected
from bench.load.measures import COLUMNS, Record, Run
from bench.load.workload import Item
from bench.server import started
from bench.timing import clock
from model.tiny.layout import lay_out
from model.tiny.lessons import tokenizer
from model.tiny.tasks import Fork, Task, transcript, write_task
from scheduler.request import Slo
from taper_client import (
    AsyncClient,
    Client,
    Completion,
    Options,
    Prompt,
    branch,
    generate_request,
    model_driven,
    parallel,
    serial,
)
from taper_client.answer import events_of
from taper_client.errors import ServiceError
from taper_client.terminal import Answer, show_live, summary
from taper_client.v1 import inference_service_pb2 as pb

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
    console.print("Starting taper-serve: it compiles one program per bucket and measures each …")
    try:
        with started(_server_options(demo.model), log=io.StringIO()) as server:
            console.print(f"It serves on {server.address} after {server.ready_seconds:.0f} s.\n")
            show(server.address, demo, console)
    except (ChildProcessError, ServiceError) as error:
        sys.exit(f"taper-demo: {error}")


def show(address: str, demo: Demo, console: Console) -> None:
    """Everything that there is to see of a server."""
    if demo.model == "smollm2":
        watch(address, ADVICE, "What should I know before I adopt a dog?", console)
        return
    show_speed(address, demo, console)
    loads = asyncio.run(compare(address, demo, console))
    first = loads[POLICIES[0]]
    disagreeing = {policy for policy in POLICIES if loads[policy].answers != first.answers}
    if disagreeing:
        sys.exit(f"taper-demo: the tokens under {', '.join(sorted(disagreeing))} differ from {POLICIES[0]}'s")
    right = f"{first.right} of {demo.requests} answers are right to the letter"
    console.print(f"The same tokens under every policy; {right}.")


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


def watch(address: str, options: Options, question: str, console: Console) -> None:
    """Ask one question; in a terminal its branches grow side by side, elsewhere they are shown at the end."""
    console.print(Rule(question))
    with Client(address) as client:
        events = client.generate(chat(question), **options)
        if console.is_terminal:
            show_live(events, console)
            return
        completion = Completion()
        for event in events:
            completion.add(event)
    console.print(Answer(completion))
    console.print(summary(completion), style="dim")


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


# --- one load, three policies ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A question of the load, and when it arrives in seconds."""

    at: float
    task: Task

    def message(self, slo: Slo | None) -> bytes:
        options = BY_ITSELF | Options(token_ids=True)
        if slo is not None:
            options |= Options(tpot_slo_ms=1e3 * slo.tpot, ttft_slo_ms=1e3 * slo.ttft)
        return generate_request(chat(self.task.question), **options).SerializeToString()


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, what its asker read, and when."""

    task: Task
    completion: Completion
    answer: driver.Answer
    record: Record

    @classmethod
    def of(cls, task: Task, reply: driver.Reply) -> Answered:
        """Raises ServiceError for a call that failed."""
        if reply.error:
            raise ServiceError(reply.error)
        completion = Completion()
        for _, raw in reply.messages:
            for event in events_of(pb.GenerateResponse.FromString(raw)):
                completion.add(event)
        answer = driver.Answer.of(reply)
        item = Item(0.0, answer.prompt_tokens, answer.stages)  # whose lengths are the model's own choice
        return cls(task, completion, answer, answer.record(item, reply.due))

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


@dataclass(frozen=True, slots=True)
class Load:
    """A load, answered under one policy in so many steps."""

    run: Run
    answered: Sequence[Answered]
    steps: int

    @classmethod
    def of(cls, policy: str, answered: Sequence[Answered], slo: Slo, seconds: float, steps: int) -> Load:
        emissions = [emission for each in answered for emission in each.answer.emissions]
        run = Run(
            policy=policy,
            slo=slo,
            seconds=seconds,
            records=[each.record for each in answered],
            tokens=sum(emission.tokens for emission in emissions),
            turns=sum(emission.steps for emission in emissions),
        )
        return cls(run, answered, steps)

    @property
    def answers(self) -> list[dict[tuple[int, str], list[tuple[int, ...]]]]:
        return [each.tokens_by_label() for each in self.answered]

    @property
    def right(self) -> int:
        return sum(each.right for each in self.answered)

    def cells(self) -> list[str]:
        row, serial_ms = self.run.row(), [1e3 * tpot for tpot in self.run.serial_tpots]
        goodput, attained, width = (COLUMNS[name].cell(row[name]) for name in FIGURES)
        right, serial = f"{self.right} of {len(self.answered)}", "-"
        if serial_ms:
            serial = f"{statistics.median(serial_ms):.1f} / {max(serial_ms):.1f}"
        return [goodput, attained, right, serial, width, f"{self.steps}", f"{self.run.seconds:.1f}"]


FIGURES = ("goodput_mean", "attainment_mean", "mean_width")
TITLES = (
    "goodput tok/s", "attainment", "right", "serial TPOT ms p50 / max", "mean width", "steps", "seconds",
)  # fmt: skip


async def compare(address: str, demo: Demo, console: Console) -> dict[str, Load]:
    """The same load under every policy, at targets that follow from this machine's own speed."""
    async with AsyncClient(address) as client, connected(address) as calls:
        await client.set_policy("off")
        crowd = await play(calls, mixed_load(replace(demo, requests=CROWD, seed=demo.seed + 1), spacing=0.0))
        tpot = 2 * statistics.quantiles([each.record.mean_tpot for each in crowd], n=4)[2]
        slo = Slo(tpot=tpot, ttft=100 * tpot)
        spacing = statistics.mean(each.record.latency for each in crowd) / CROWD
        jobs = mixed_load(demo, spacing=spacing)
        console.print(
            Rule(f"{demo.requests} questions, half of them with independent parts, under three policies")
        )
        console.print(
            f"Targets by rule: TPOT {1e3 * slo.tpot:.1f} ms, twice the upper quartile of {CROWD} such"
            f" questions at once, under off; TTFT {1e3 * slo.ttft:.0f} ms, 100 times that. A question comes"
            f" every {1e3 * spacing:.0f} ms on average, the crowd's mean time for an answer by {CROWD}."
        )
        table = Table("policy", *TITLES)
        loads: dict[str, Load] = {}
        for policy in POLICIES:
            await client.set_policy(policy)
            steps, began = (await client.load()).steps, clock()
            answered = await play(calls, jobs, slo)
            seconds, steps = clock() - began, (await client.load()).steps - steps
            loads[policy] = Load.of(policy, answered, slo, seconds, steps)
            table.add_row(policy, *loads[policy].cells())
        console.print(table)
        console.print(knee(loads["eager"].run))
    return loads


def knee(eager: Run) -> str:
    """Whether it cost others their target that every branch was admitted."""
    slowed = sum(tpot > eager.slo.tpot for tpot in eager.serial_tpots)
    if slowed:
        return (
            f"With every branch admitted, {slowed} serial answers missed their TPOT: taper is there for them."
        )
    return (
        "No knee here: with every branch admitted, no serial answer missed its TPOT. Steps of many rows cost"
        " this machine hardly more than steps of few, so taper has nothing to hold back."
    )


def mixed_load(demo: Demo, *, spacing: float) -> list[Job]:
    """Poisson arrivals, on average `spacing` seconds apart; every second answer forks."""
    rng = random.Random(demo.seed)
    whole = (task for task in questions(demo.seed) if not parts(task))
    parted = (task for task in questions(demo.seed) if parts(task))
    jobs: list[Job] = []
    at = 0.0
    for index in range(demo.requests):
        jobs.append(Job(at, next(parted if index % 2 else whole)))
        at += spacing * rng.expovariate(1.0)
    return jobs


async def play(calls: Driver, jobs: Sequence[Job], slo: Slo | None = None) -> list[Answered]:
    """Every question asked at its time."""
    messages = [job.message(slo) for job in jobs]
    replies = await driver.play(calls, messages, [job.at for job in jobs])
    return [Answered.of(job.task, reply) for job, reply in zip(jobs, replies, strict=True)]


if __name__ == "__main__":
    main()
