"""Waiting for what another thread or process does, or for its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from serve.door import News, is_last


class Listener:
    """The sink of a request: its news as they came, and when they ended."""

    def __init__(self) -> None:
        self.batches: list[Sequence[News]] = []
        self.ended = threading.Event()

    def __call__(self, news: Sequence[News]) -> None:
        self.batches.append(news)
        if is_last(news[-1]):
            self.ended.set()

    @property
    def news(self) -> list[News]:
        return [piece for batch in self.batches for piece in batch]

    def wait(self, seconds: float = 30.0) -> list[News]:
        assert self.ended.wait(seconds), "the request did not end"
        return self.news


def is_alive(process: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, and before it is read
        return False


def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait for it; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.001)
    return time.monotonic() - began
