"""How far a long load has come, said every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Watch = Callable[[int, int], None]  # called with the bytes that are in place, and with all of them

GB = 1e9
EVERY = 5.0  # seconds


def unwatched(done: int, of: int) -> None:
    """For whoever does not want to know."""


@dataclass(slots=True)
class SaidSometimes:
    """Passes on bytes of bytes, as "12.3 of 61.0 GB", at most once in EVERY seconds.

    What takes less than that is over before there is something to say.
    """

    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _said: float = field(init=False)

    def __post_init__(self) -> None:
        self._said = self.clock()

    def __call__(self, done: int, of: int) -> None:
        if self.clock() - self._said >= EVERY:
            self._said = self.clock()
            self.say(f"{done / GB:.1f} of {of / GB:.1f} GB")
