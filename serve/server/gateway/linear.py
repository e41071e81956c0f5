"""An answer with branches as one sequence of tokens: what the model itself reads after the last join."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from scheduler.events import Event, StageFinished, StageStarted, TokenEmitted
from scheduler.step import Sample


class Piece(NamedTuple):
    """One token of the sequence. `sample` is None for a token that the program forced, and nobody drew."""

    token: int
    sample: Sample | None = None


_Fork = tuple[int, ...]
"""The branches that begin at some place in a sequence, in the order in which they are joined."""


class LinearView:
    """The tokens of a branch and of all that fork from it, in reading order.

    Branches are decoded at the same time and read one after the other: what is known of a later one waits
    here until those before it have ended. The first that has not ended is read as it grows.

    root  the branch; only events of it and of its descendants may come
    """

    def __init__(self, root: int = 0) -> None:
        self._waiting: dict[int, deque[Piece | _Fork]] = {root: deque()}
        self._ended: set[int] = set()
        self._reading = [root]  # the branch that is read, and below it those that wait for its end

    @property
    def is_over(self) -> bool:
        """Whether the root has ended, and all has been read."""
        return not self._reading

    def add(self, event: Event) -> None:
        match event:
            case TokenEmitted(branch=branch, sample=sample):
                self._waiting[branch].append(Piece(sample.token, sample))
            case StageStarted():
                self._begin(event)
            case StageFinished(branch=branch, final=True):
                self._ended.add(branch)
            case _:
                pass  # of no token

    def read(self) -> Iterator[Piece]:
        """What can be read now and has not been read before."""
        while self._reading:
            branch = self._reading[-1]
            waiting = self._waiting[branch]
            if waiting:
                item = waiting.popleft()
                if isinstance(item, Piece):
                    yield item
                else:
                    self._reading.extend(reversed(item))
            elif branch in self._ended:
                self._reading.pop()
                del self._waiting[branch]
            else:
                return

    def _begin(self, event: StageStarted) -> None:
        new = tuple(info.branch for info in event.branches if info.branch not in self._waiting)
        if new:
            self._waiting[event.branches[0].parent].append(new)
        for info in event.branches:
            forced = map(Piece, info.prefix)
            self._waiting.setdefault(info.branch, deque()).extend(forced)
