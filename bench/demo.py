"""`taper-demo`: a real server whose answer branches, the same tokens under every policy, a card simulated.

The server runs as a process of its own, and is asked over gRPC. The embedded model forks by itself, and its
answers can be checked: the demo fails if a policy changes them. What a policy is worth does not show on a CPU
and a model of this size, so the last part simulates a card (bench.simulate.card).
"""

from __future__ import annotations

import asyncio
import io
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.rule import Rule

from bench.load import driver
from bench.load.driver import connected
from bench.load.workload import TPOT_SLO_MULTIPLE
from bench.progress import progress, waiting
from bench.server import started
from bench.simulate import card
from model.tiny.layout import lay_out
from model.tiny.lessons import tokenizer
from model.tiny.tasks import Fork, Task, transcript, write_task
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
from taper_client.errors import ServiceError
from taper_client.events import Timing, events_of
from taper_client.terminal import Answer, show_live, summary
from taper_client.v1 import inference_service_pb2 as pb

POLICIES = tuple(card.POLICIES)
SIX_PART_QUESTIONS = 200
SPEED_TURNS = 3
BUCKETS = ["1", "8"]  # two programs: one row for one branch at a time, eight for six at once
SMOLLM2_FOLDER = Path("checkpoints/smollm2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """Watch an answer branch, and see what admission policies do."""

    model: Literal["default", "smollm2"] = "default"
    """`default`, or `smollm2`, which is fetched when first used and answers one question."""
    requests: int = 16
    """Questions that are asked under every policy; every second one has independent parts."""
    seed: int = 3_000_017
    """Of the questions, which training has not seen."""


def main(args: list[str] | None = None) -> None:
    """Console entry point."""
    demo = tyro.cli(Demo, prog="taper-demo", description=Demo.__doc__, args=args)
    console = Console(highlight=False)
    try:
        with serving(server_options(demo.model, console), console) as address:
            ask(address, demo, console)
        if demo.model == "default":
            simulate(console)
    except (ChildProcessError, ServiceError) as error:
        sys.exit(f"taper-demo: {error}")


def ask(address: str, demo: Demo, console: Console) -> None:
    """What a server has to show."""
    if demo.model == "smollm2":
        headline("One answer that branches", console)
        watch(address, ADVICE, "What should I know before I adopt a dog?", console)
        return
    tpot = show_speed(address, demo, console)
    compare(address, demo, tpot, console)


def simulate(console: Console) -> None:
    """What policies do where steps take longer the more they hold. Ends with what it came to, in a line."""
    setting = card.setting()
    headline("Policies on a card, simulated", console)
    console.print(card.described(setting))
    total = len(POLICIES) * len(setting.workload.items)
    with progress("simulated answers", total, transient=True) as advance:
        found = card.outcomes(setting, advance)
    console.print(card.table([*found.values()]))
    console.print(card.verdict(found))


def headline(text: str, console: Console) -> None:
    console.print()
    console.print(Rule(text))


# --- the server --------------------------------------------------------------------------------------------


class Log(io.StringIO):
    """Keeps what the server says, and tells how far its start has come."""

    COMPILED = re.compile(r"compiled .*program='(\d+ of \d+)'")

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def write(self, text: str, /) -> int:
        if compiled := self.COMPILED.search(text):
            self._tell(f"compiled {compiled[1]} programs")
        return super().write(text)


@contextmanager
def serving(options: Sequence[str], console: Console) -> Iterator[str]:
    """The address of a server, as long as it is needed. Raises ChildProcessError with what it said."""
    with ExitStack() as stack:
        with moving("Starting taper-serve", console) as tell:
            log = Log(tell)
            try:
                server = stack.enter_context(started(options, log, quiet=True))
            except ChildProcessError as error:
                raise ChildProcessError(f"{error}\n{log.getvalue()}") from error
        console.print(f"taper-serve is ready after {server.ready_seconds:.0f} s.")
        yield server.address


@contextmanager
def moving(what: str, console: Console) -> Iterator[Callable[[str], None]]:
    """Shows that something goes on, and takes what is new of it: lines where there is no terminal."""
    if console.is_terminal:
        with console.status(f"{what} …") as status:
            yield lambda news: status.update(f"{what}: {news} …")
    else:
        console.print(f"{what} …")
        with waiting(what):
            yield console.print


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


def server_options(model: str, console: Console) -> list[str]:
    """What taper-serve is started with; fetches a model that is not there yet."""
    if model == "default":
        return ["--buckets", *BUCKETS]
    if not (SMOLLM2_FOLDER / "config.json").exists():
        from model.smollm2 import ConversionError, convert  # imports JAX, which nothing else here does

        with moving("Fetching SmolLM2-135M-Instruct, 90 MB", console):
            try:
                convert(SMOLLM2_FOLDER)
            except ConversionError as error:
                sys.exit(f"taper-demo: {error}")
    return ["--model", str(SMOLLM2_FOLDER), "--buckets", "4", "32", "--max-context", "2048"]


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
    """Ask one question, whatever the machine can promise; its branches grow side by side in a terminal, and
    are shown at the end elsewhere."""
    console.print(question, style="bold")
    with Client(address) as client:
        client.set_policy("eager")
        events = client.generate(chat(question), **options)
        if console.is_terminal:
            show_live(events, console, tags=False)
            return
        completion = Completion()
        for event in events:
            completion.add(event)
    console.print(Answer(completion, tags=False))
    console.print(summary(completion), style="dim")


def show_speed(address: str, demo: Demo, console: Console) -> float:
    """One question with six parts, watched; then with branches and without, in turns.

    Returns the seconds that a token takes without branches.
    """
    task = watched_question(demo.seed)
    timings: dict[str, list[Timing]] = {"eager": [], "off": []}
    headline("One answer that branches", console)
    watch(address, BY_ITSELF, task.question, console)
    bar = progress("answers", len(timings) * SPEED_TURNS, transient=True)
    with Client(address) as client, bar as advance:
        for policy, measured in SPEED_TURNS * [*timings.items()]:
            client.set_policy(policy)
            measured.append(client.complete(chat(task.question), **BY_ITSELF).timing)
            advance()
    branched, serial = (statistics.median(each.total for each in measured) for measured in timings.values())
    console.print(
        f"Again, {SPEED_TURNS} times each in turns: {branched:.2f} s with all branches at once,"
        f" {serial:.2f} s with one at a time, {serial / branched:.1f} times as long (medians). Its"
        f" tokens and its longest path allow {gain(task):.1f}; it was chosen among {SIX_PART_QUESTIONS}"
        " questions for that."
    )
    return statistics.median(each.tpot for each in timings["off"])


# --- the same tokens under every policy --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, and what its asker read."""

    task: Task
    completion: Completion

    @classmethod
    def of(cls, task: Task, reply: driver.Reply) -> Answered:
        """Raises ServiceError for a call that failed."""
        if reply.error:
            raise ServiceError(reply.error)
        completion = Completion()
        for _, raw in reply.messages:
            for event in events_of(pb.GenerateResponse.FromString(raw)):
                completion.add(event)
        return cls(task, completion)

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


def compare(address: str, demo: Demo, tpot: float, console: Console) -> dict[str, list[Answered]]:
    """The same questions at once under every policy, with twice the `tpot` as target, so that taper chooses.

    Ends the process with an error if the tokens differ.
    """
    headline("The same tokens, whatever the policy", console)
    tasks = mixed(demo)
    slo = Options(tpot_slo_ms=1e3 * TPOT_SLO_MULTIPLE * tpot, on_miss="best_effort")
    with progress("answers", len(POLICIES) * len(tasks), transient=True) as advance:
        answers = asyncio.run(_play(address, tasks, slo, advance))
    first, *others = POLICIES
    tokens = {policy: [each.tokens_by_label() for each in answers[policy]] for policy in POLICIES}
    differing = [policy for policy in others if tokens[policy] != tokens[first]]
    if differing:
        sys.exit(f"taper-demo: the tokens under {' and '.join(differing)} differ from {first}'s")
    right = sum(each.right for each in answers[first])
    console.print(
        f"{len(tasks)} questions at once, half of them with independent parts, under {', '.join(POLICIES)}:"
        f" the same tokens under each. {right} of {len(tasks)} answers are right to the letter."
    )
    return answers


def mixed(demo: Demo) -> list[Task]:
    """Questions of which every second one has independent parts."""
    whole = (task for task in questions(demo.seed) if not parts(task))
    parted = (task for task in questions(demo.seed) if parts(task))
    return [next(parted if index % 2 else whole) for index in range(demo.requests)]


async def _play(
    address: str, tasks: Sequence[Task], slo: Options, advance: Callable[[], None]
) -> dict[str, list[Answered]]:
    options = BY_ITSELF | slo | Options(token_ids=True)
    messages = [generate_request(chat(task.question), **options).SerializeToString() for task in tasks]
    answers: dict[str, list[Answered]] = {}
    async with AsyncClient(address) as client, connected(address) as calls:
        for policy in POLICIES:
            await client.set_policy(policy)
            replies = await driver.play(calls, messages, [0.0] * len(tasks), on_reply=lambda reply: advance())
            answers[policy] = [Answered.of(*each) for each in zip(tasks, replies, strict=True)]
    return answers


if __name__ == "__main__":
    main()
