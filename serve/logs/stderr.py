"""The log goes to standard error, and nobody waits for it, or fails because nobody reads it any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable


class Stderr(io.TextIOBase):
    """Standard error. What it does not take, as its reader is gone or far behind, is dropped.

    on_dropped  is told how many lines were, once there is room again
    """

    MOST_WAITING = 1 << 20  # characters

    def __init__(self) -> None:
        self.on_dropped: Callable[[int], object] = lambda count: None
        self._change = threading.Condition()
        self._waiting: deque[str] = deque()
        self._size = 0  # of what waits and of what is being written
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def write(self, text: str, /) -> int:
        with self._change:
            if self._size + len(text) <= self.MOST_WAITING:
                self._waiting.append(text)
                self._size += len(text)
            else:
                self._dropped += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="taper-log", daemon=True)
                self._thread.start()
            self._change.notify_all()
        return len(text)

    def drain(self, timeout: float = 1.0) -> None:
        """Wait until all is written, up to `timeout` seconds: before the process ends."""
        with self._change:
            self._change.wait_for(lambda: not self._size, timeout)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting)
                text = "".join(self._waiting)
                self._waiting.clear()
                dropped, self._dropped = self._dropped, 0
            with contextlib.suppress(OSError, ValueError):  # or it is closed
                _put(text)
            with self._change:
                self._size -= len(text)
                self._change.notify_all()
            if dropped:
                self.on_dropped(dropped)


def _put(text: str) -> None:
    """Write to standard error, past Python's buffer: who holds that cannot let the interpreter end."""
    try:
        number = sys.stderr.fileno()
    except (OSError, ValueError):  # something else is in its place
        sys.stderr.write(text)
        return
    data = text.encode(errors="backslashreplace")
    while data:
        data = data[os.write(number, data) :]


STDERR = Stderr()
