"""What waits to be read: a queue for each client, of which each has its turn."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Line(Generic[T]):
    """What waits of one client, each with its weight."""

    waiting: deque[tuple[T, int]]
    weight: int = 0


class FairQueue(Generic[T]):
    """Items of many clients, taken in turns. Used in one event loop.

    share  items of one client that may be at work at once
    room   the most that waiting items may weigh together
    """

    def __init__(self, *, share: int, room: int) -> None:
        self._share, self._room = share, room
        self._lines: OrderedDict[str, _Line[T]] = OrderedDict()
        self._working: Counter[str] = Counter()
        self._weight = 0
        self._change = asyncio.Event()

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    def put(self, client: str, item: T, weight: int) -> list[T]:
        """Returns what there is no room for: the newest of those clients that have most."""
        line = self._lines.setdefault(client, _Line(deque()))
        line.waiting.append((item, weight))
        line.weight += weight
        self._weight += weight
        dropped: list[T] = []
        while self._weight > self._room:
            name, heaviest = max(self._lines.items(), key=lambda entry: entry[1].weight)
            dropped.append(self._pop(name, heaviest, last=True))
        self._change.set()
        return dropped

    async def take(self) -> tuple[str, T]:
        """The next item and its client, for which `done` is to be called."""
        while True:
            for name, line in self._lines.items():
                if self._working[name] < self._share:
                    self._working[name] += 1
                    if len(line.waiting) > 1:
                        self._lines.move_to_end(name)
                    return name, self._pop(name, line, last=False)
            self._change.clear()
            await self._change.wait()

    def done(self, client: str) -> None:
        """An item that was taken is at work no more."""
        self._working[client] -= 1
        if not self._working[client]:
            del self._working[client]
        self._change.set()

    def _pop(self, name: str, line: _Line[T], *, last: bool) -> T:
        item, weight = line.waiting.pop() if last else line.waiting.popleft()
        line.weight -= weight
        self._weight -= weight
        if not line.waiting:
            del self._lines[name]
        return item
