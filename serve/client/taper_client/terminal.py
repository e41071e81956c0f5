"""What a terminal shows of an answer: branches side by side as they grow."""

from __future__ import annotations

from collections.abc import Iterable

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from .answer import Branch, BranchFinished, Completion, Delta, Event, StageStarted

SHOWN_AGAIN = b"\x1b[?25h\n"
"""What a terminal needs where `show_live` is left in its midst: the cursor, which it hides, on a new line."""


def show_live(events: Iterable[Event], console: Console) -> None:
    """The answer is drawn anew whenever something of it has come."""
    completion = Completion()
    with Live(Answer(completion), console=console, refresh_per_second=20) as live:
        for event in events:
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
                drawn.append(Text(part.lstrip("\n")))  # a panel begins with a line of its own anyway
        return Group(*(part for part in drawn if not isinstance(part, Text) or part.plain.strip()))

    def _panel(self, sequence: Branch, width: int) -> Panel:
        style = "green" if sequence.finish_reason else "yellow"
        return Panel(
            self._sequence(sequence, width - 4),
            title=Text(sequence.label or f"branch {sequence.id}"),
            subtitle=f"{sequence.completion_tokens} tokens",
            border_style="dim" if sequence.outrun else style,
            width=width,
        )
