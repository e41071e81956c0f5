"""How many programs this process has compiled, and how many it has found compiled."""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import jax

from serve.door import Programs

_OBTAINED = "/jax/core/compile/backend_compile_duration"  # of each program, compiled or found
_FOUND = "/jax/compilation_cache/cache_hits"


class _Count(NamedTuple):
    """Since the process began."""

    obtained: int
    found: int


class _Listener:
    """Counts what JAX tells of, from whichever thread it compiles in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = _Count(0, 0)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    @property
    def count(self) -> _Count:
        return self._count

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _OBTAINED:
            with self._lock:
                self._count = self._count._replace(obtained=self._count.obtained + 1)

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _FOUND:
            with self._lock:
                self._count = self._count._replace(found=self._count.found + 1)


@functools.cache
def _listener() -> _Listener:
    """One for the process: JAX's own events are the process's."""
    return _Listener()


class ProgramCount:
    """Of one engine, from here on; the small programs that make and move its arrays are counted, too."""

    def __init__(self) -> None:
        self._listener = _listener()
        self._began = self._listener.count
        self._served: _Count | None = None

    def serving(self) -> None:
        """It has started: what it gets from now on is late."""
        self._served = self._listener.count

    def now(self) -> Programs:
        count = self._listener.count
        served = count if self._served is None else self._served
        return Programs(*_since(self._began, served), *_since(served, count))


def _since(before: _Count, after: _Count) -> tuple[int, int]:
    """Compiled and found between the two."""
    found = after.found - before.found
    return after.obtained - before.obtained - found, found
