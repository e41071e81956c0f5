"""Shows that a long run goes on: a bar on a terminal, a line now and then elsewhere. To standard error.

Where what goes on is timed, `waiting` shows it: one line every few seconds, on a terminal, too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.timing import clock

Thing = TypeVar("Thing")

EVERY = 10.0  # seconds between two lines


@contextmanager
def progress(what: str, total: int, *, transient: bool = False) -> Iterator[Callable[[], None]]:
    """What moves a display of `total` things, such as "simulations", on by one.

    A bar that is transient leaves nothing on the terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total)
        return
    left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), left
    with Progress(*columns, console=console, refresh_per_second=4, transient=transient) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def tracked(these: Iterable[Thing], what: str, total: int) -> Iterator[Thing]:
    """The same, one by one, while their number is shown."""
    with progress(what, total) as advance:
        for each in these:
            advance()
            yield each


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says every few seconds for how long something such as "serving the requests" has gone on."""
    began, over = clock(), threading.Event()

    def tell() -> None:
        while not over.wait(EVERY):
            print(f"{what}: {clock() - began:.0f} s", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, name="waiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _lines(what: str, total: int) -> Callable[[], None]:
    began = said = clock()
    done = 0

    def advance() -> None:
        nonlocal done, said
        done += 1
        now = clock()
        if now - said >= EVERY and done < total:
            said = now
            left = (now - began) / done * (total - done)
            print(f"{what}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
