"""Keeps Python's garbage collector from stopping the engine.

A full collection visits every object that lives: tens of milliseconds once some hundred requests run, and all
of them wait. What lives as long as the process (weights, programs) is taken out of its sight at the start;
collections of young objects, which take no time to speak of, go on; full ones wait until nothing runs, or for
`LONGEST` seconds on a server that is never idle.
"""

from __future__ import annotations

import gc

YOUNG, MIDDLE, NEVER = 5_000, 20, 1_000_000_000  # thresholds of gc: allocations, then collections before


class Collector:
    """Decides when to collect everything. Times are in seconds, by the caller's clock."""

    LONGEST = 600.0

    def __init__(self) -> None:
        self._last = 0.0

    def start(self, now: float) -> None:
        """What exists now is never visited again."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG, MIDDLE, NEVER)
        self._last = now

    def idle(self, now: float) -> None:
        """Nothing runs: a good time."""
        gc.collect()
        self._last = now

    def busy(self, now: float) -> None:
        """A step has ended, and others follow."""
        if now - self._last > self.LONGEST:
            self.idle(now)
