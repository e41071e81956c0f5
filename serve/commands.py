"""The console commands `taper-serve` and `taper-client`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from serve.api.errors import ServiceError
from serve.client.answer import Branch, BranchFinished, Completion, Delta, Joined, StageStarted
from serve.client.client import Client, Options, Prompt, branch, model_driven, parallel, sampling, serial
from serve.config import ServerConfig


def serve(args: list[str] | None = None) -> None:
    """Serve a model over gRPC until SIGTERM."""
    config = tyro.cli(ServerConfig, prog="taper-serve", description=serve.__doc__, args=args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU: the server owns it
    from serve.engine.startup import load  # JAX takes seconds to import: not for --help
    from serve.server.server import run

    try:
        run(config, load)
    except (OSError, ValueError) as error:
        sys.exit(f"taper-serve: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask a server, and watch its answer grow."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The question, or what to go on from with --raw."""
    branch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that one branch begins with; repeat it for each branch."""
    conclude: str = ""
    """Text that goes on after the branches have been joined."""
    raw: bool = False
    """Go on from the prompt as it is, also where the model could be asked in a chat."""
    max_tokens: int | None = None
    """Limit of each sequence; the server's own unless set."""
    temperature: float | None = None
    """0 is greedy, the default."""
    seed: int | None = None
    """Same seed, same answer."""
    address: str = "127.0.0.1:50051"
    """Where the server listens."""


def client(args: list[str] | None = None) -> None:
    """Run one request, with branches side by side in a terminal, as plain lines otherwise."""
    ask = tyro.cli(Ask, prog="taper-client", description=Ask.__doc__, args=args)
    console = Console()
    try:
        with Client(ask.address) as connection:
            show = _show_live if console.is_terminal else _show_lines
            show(connection, ask, console)
    except ServiceError as error:
        sys.exit(f"taper-client: {error.code.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _question(connection: Client, ask: Ask) -> tuple[Prompt, Options]:
    """As a chat where the model knows chats; with the model's own branches unless others are asked for."""
    info = connection.model_info()
    chat = info.supports_chat and not ask.raw
    options = Options(
        max_tokens=ask.max_tokens, sampling=sampling(temperature=ask.temperature, seed=ask.seed)
    )
    if ask.branch:
        unique = len(set(map(str.strip, ask.branch))) == len(ask.branch)
        labels = [text.strip() if unique else "" for text in ask.branch]
        branches = [branch(text, label=label) for text, label in zip(ask.branch, labels, strict=True)]
        options["plan"] = [parallel(branches, max_tokens=ask.max_tokens)]
        if ask.conclude:
            options["plan"] = [*options["plan"], serial(ask.conclude, max_tokens=ask.max_tokens)]
    elif chat and info.default_tag_set:
        options["plan"] = model_driven(max_tokens=ask.max_tokens)
    return ([{"role": "user", "content": ask.prompt}] if chat else ask.prompt), options


def _show_lines(connection: Client, ask: Ask, console: Console) -> None:
    """What is whole is printed: a branch when it ends, then the answer and what it took."""
    completion = Completion()
    prompt, options = _question(connection, ask)
    for event in connection.generate(prompt, **options):
        completion.add(event)
        if isinstance(event, BranchFinished) and event.branch:
            done = next(each for each in completion.branches if each.id == event.branch)
            print(f"[{done.id} {done.label}] {done.prefix}{done.text}", flush=True)
        elif isinstance(event, Joined):
            print(f"[joined {', '.join(map(str, event.branches))}]", flush=True)
    print(completion.text)
    print(summary(completion), file=sys.stderr)


def _show_live(connection: Client, ask: Ask, console: Console) -> None:
    completion = Completion()
    prompt, options = _question(connection, ask)
    with Live(Answer(completion), console=console, refresh_per_second=20) as live:
        for event in connection.generate(prompt, **options):
            completion.add(event)
            if isinstance(event, Delta | StageStarted | BranchFinished):
                live.update(Answer(completion))
    console.print(Text(summary(completion), style="dim"))


def summary(completion: Completion) -> str:
    """One line of what an answer took."""
    usage, timing = completion.usage, completion.timing
    width = max((width for width, _ in completion.widths), default=1)
    return (
        f"{usage.completion_tokens} tokens, {usage.critical_path_tokens} on the longest path, "
        f"up to {width} at once; first after {1e3 * timing.ttft:.0f} ms, "
        f"then {1e3 * timing.tpot:.1f} ms each; {timing.total:.2f} s in all"
    )


class Answer:
    """A completion as rich draws it: the trunk's text, and branches side by side where they forked."""

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        self._branches = {each.id: each for each in (completion.trunk, *completion.branches)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._sequence(self._completion.trunk, options.max_width)

    def _sequence(self, sequence: Branch, width: int) -> Group:
        drawn: list[Text | Columns] = []
        for part in sequence.parts:
            if not isinstance(part, str):
                each = max(24, width // max(1, len(part)) - 1)
                panels = [self._panel(self._branches[id], min(each, width)) for id in part]
                drawn.append(Columns(panels, padding=(0, 0)))
            elif drawn and isinstance(drawn[-1], Text):
                drawn[-1].append(part)
            else:
                drawn.append(Text(part))
        return Group(*(part for part in drawn if not isinstance(part, Text) or part.plain.strip()))

    def _panel(self, sequence: Branch, width: int) -> Panel:
        done = bool(sequence.finish_reason)
        return Panel(
            self._sequence(sequence, width - 4),
            title=Text(sequence.label or f"branch {sequence.id}"),
            subtitle=f"{sequence.completion_tokens} tokens",
            border_style="green" if done else "yellow",
            width=width,
        )
