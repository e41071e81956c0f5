"""What a terminal shows of an answer: branches side by side as they grow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import ceil
from threading import Lock

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .answer import Branch, Completion
from .events import Event

SHOWN_AGAIN = b"\x1b[?25h\n"
"""What a terminal needs where `show_live` is left in its midst: the cursor, which it hides, on a new line."""

NARROWEST = 25  # columns of a panel, where there are so many
BORDERS = 4  # columns of a panel that are not text

# Of the tag sets that a server knows by name, with the space around them; and what may become such a tag.
TAG_NAMES = "Parallel|Goal|Outlines?|Path|Conclusion|Thread|guideline|plan|step|takeaway"
TAGS = re.compile(rf"(?:\s*</?(?:{TAG_NAMES})>\s*)+")
UNFINISHED_TAG = re.compile(r"</?\w*\Z")


def show_live(events: Iterable[Event], console: Console, *, tags: bool = True) -> None:
    """The answer as it grows, and then what it took. `tags`: as of an `Answer`."""
    growing = _Growing(tags)
    with Live(growing, console=console, refresh_per_second=12, vertical_overflow="crop") as live:
        for event in events:
            growing.add(event)
        # All of it, also where it is longer than the screen.
        live.update(Answer(growing.completion, tags=tags))
    console.print(Text(summary(growing.completion), style="dim"))


def summary(completion: Completion) -> str:
    """One line of what an answer took."""
    usage, timing = completion.usage, completion.timing
    width = max((width for width, _ in completion.widths), default=1)
    return (
        f"{usage.completion_tokens} tokens, {usage.critical_path_tokens} on the longest path, "
        f"up to {width} at once; first after {1e3 * timing.ttft:.0f} ms, "
        f"then {1e3 * timing.tpot:.1f} ms each; {timing.total:.2f} s in all"
    )


class _Growing:
    """An answer that is drawn by one thread while another adds to it; its end, where not all of it fits."""

    def __init__(self, tags: bool) -> None:
        self.completion = Completion()
        self._tags = tags
        self._lock = Lock()

    def add(self, event: Event) -> None:
        with self._lock:
            self.completion.add(event)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            lines = console.render_lines(Answer(self.completion, tags=self._tags), options, pad=False)
        for line in lines[1 - console.height :]:
            yield from line
            yield Segment.line()


class Answer:
    """A completion as rich draws it: the trunk's text, and branches side by side where they forked.

    The panels of one row are as high as the highest of them, so that they grow together. Without `tags`,
    those by which a model forks are left out, and the lines of its plan become the titles of its branches.
    """

    def __init__(self, completion: Completion, *, tags: bool = True) -> None:
        self._completion = completion
        self._tags = tags

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        branches = {each.id: each for each in (self._completion.trunk, *self._completion.branches)}
        yield self._sequence(self._completion.trunk, branches, console, options.max_width)

    def _sequence(
        self, sequence: Branch, branches: dict[int, Branch], console: Console, width: int
    ) -> RenderableType:
        drawn: list[RenderableType] = []
        said = ""
        for part in sequence.parts:
            if isinstance(part, str):
                said += part
                continue
            forked = [branches[id] for id in part]
            rows = ceil(len(forked) / max(1, width // NARROWEST))
            columns = ceil(len(forked) / rows)
            text, titles = _titles(self._read(said, sequence), forked, width // columns - BORDERS)
            if text:
                drawn.append(Text(text))
            for row in range(0, len(forked), columns):
                beside, named = forked[row : row + columns], titles[row : row + columns]
                drawn.append(self._row(beside, named, branches, console, width // columns))
            said = ""
        if not sequence.finish_reason and not self._tags:
            said = UNFINISHED_TAG.sub("", said)
        if text := self._read(said, sequence):
            drawn.append(Text(text))
        return Group(*drawn)

    def _row(
        self,
        beside: Sequence[Branch],
        titles: Sequence[str],
        branches: dict[int, Branch],
        console: Console,
        width: int,
    ) -> Table:
        inner = console.options.update(width=max(1, width - BORDERS), height=None)
        drawn = [self._sequence(each, branches, console, inner.max_width) for each in beside]
        height = max(1, *(len(console.render_lines(each, inner)) for each in drawn))
        row = Table.grid()
        row.add_row(
            *(
                Panel(
                    content,
                    title=Text(title),
                    subtitle=f"{each.completion_tokens} tokens",
                    border_style="dim" if each.outrun else "green" if each.finish_reason else "yellow",
                    width=width,
                    height=height + 2,
                )
                for each, title, content in zip(beside, titles, drawn, strict=True)
            )
        )
        return row

    def _read(self, text: str, sequence: Branch) -> str:
        """What a sequence says at a stretch, without empty lines at its ends."""
        if not self._tags:
            text = TAGS.sub("\n", text).lstrip()
            if sequence.label:  # which its title says
                text = text.removeprefix(f"{sequence.label}:").lstrip(" ")
        return text.lstrip("\n").rstrip()


def _titles(text: str, forked: Sequence[Branch], width: int) -> tuple[str, list[str]]:
    """What is left of the text before a fork, and titles: of its last lines, if they name all and fit."""
    lines = text.split("\n")
    before, plan = lines[: -len(forked)], lines[-len(forked) :]
    titles = [each.label or f"branch {each.id}" for each in forked]
    named = [line.partition(":")[0] for line in plan] == titles
    if named and all(cell_len(line) <= width - 2 for line in plan):
        return "\n".join(before), plan
    return text, titles
