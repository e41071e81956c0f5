"""What the engine's process has to tell the server's: a message a step, or fewer if the server is behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from serve.door import Load, News, StepRecord
from serve.remote.channel import Channel
from serve.remote.messages import Happened
from serve.remote.rows import pack


class Outgoing:
    """Gathers what happens, from any thread, and sends it together."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._news: list[tuple[int, Sequence[News]]] = []
        self._steps: list[StepRecord] = []

    def news(self, handle: int, news: Sequence[News]) -> None:
        """Something is new of a request."""
        with self._lock:
            self._news.append((handle, news))

    def step(self, record: StepRecord) -> None:
        """A step has ended, and its news are here."""
        with self._lock:
            self._steps.append(record)

    def send(self, load: Callable[[], Load], *, last: bool = False, failed: str = "") -> None:
        """Tell all of it, and how busy the engine is; later, if the server has not taken what it was told and
        this is not the last time."""
        if self._channel.is_behind and not last:
            return
        with self._lock:
            news, self._news = self._news, []
            steps, self._steps = self._steps, []
            self._channel.send(Happened(*pack(news), steps=tuple(steps), load=load(), failed=failed))
