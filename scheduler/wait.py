"""When the first token of a newcomer can come: what the gate asks before it lets one in.

    first token = max(wait to start, time to read the prompts ahead) + time to read its own

Both are learned. While requests wait, each start says how long the one before it kept its place free for the
next; each step that reads prompts says how fast that goes, and each prompt how much of it was not cached.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable


class WaitModel:
    """Seconds between starts while requests wait, and prompt tokens read in a second."""

    STARTS = 64  # of late, whose mean is taken
    KEPT = 0.98  # of what is known of reading, with each step that reads
    LEAST_GAP = 1e-6  # as several may start at once
    CAUTION = 2.5  # standard deviations of the wait that are provided for: starts come as they come
    WEIGHT = 2  # starts that the first guess counts for

    def __init__(self, tokens_per_second: float) -> None:
        """`tokens_per_second`: of prompts, until any has been read."""
        self._gaps: deque[float] = deque(maxlen=self.STARTS)
        self._since: float | None = None  # the last start, or the moment from which requests wait
        self._seconds, self._rows = 1.0, tokens_per_second
        self._prompt_tokens = self._computed_tokens = 1.0

    # --- what happened ---------------------------------------------------------------------------------

    def started(self, now: float) -> None:
        """A request started; whether it had to wait is known already."""
        if self._since is not None:
            self._gaps.append(now - self._since)
            self._since = now

    def waits(self, now: float) -> None:
        """All have started that may, and others still wait."""
        if self._since is None:
            self._since = now

    def nobody_waits(self) -> None:
        self._since = None

    def read(self, seconds: float, rows: int, *, all_there_was: bool = False) -> None:
        """A step of `seconds` computed so many tokens of prompts; if there were no more, it says only that
        reading is at least as fast."""
        if all_there_was and rows * self._seconds < self._rows * seconds:
            return
        self._seconds = self.KEPT * self._seconds + seconds
        self._rows = self.KEPT * self._rows + rows

    def prompt(self, tokens: int, computed: int) -> None:
        """A prompt has been read, of whose tokens so many had to be computed."""
        self._prompt_tokens = self.KEPT * self._prompt_tokens + tokens
        self._computed_tokens = self.KEPT * self._computed_tokens + computed

    # --- what follows ----------------------------------------------------------------------------------

    @property
    def is_blocked(self) -> bool:
        """Whether requests wait that may not start yet."""
        return self._since is not None

    def reading(self, tokens: int) -> float:
        """Seconds to read so many prompt tokens, some of which are cached."""
        return tokens * self._computed_tokens / self._prompt_tokens * self._seconds / self._rows

    def gap(self, guess: Callable[[], float]) -> float:
        """Seconds between two starts while requests wait; what `guess` says counts while few are known."""
        weight = max(0, self.WEIGHT - len(self._gaps))
        guessed = weight * guess() if weight else 0.0
        return max(self.LEAST_GAP, (sum(self._gaps) + guessed) / (len(self._gaps) + weight))

    def longest(self, starts: int) -> float:
        """Gaps until so many starts have come, in nearly all cases."""
        return starts + self.CAUTION * math.sqrt(starts)

    def most_starts(self, gaps: float) -> int:
        """The most starts that have come after so many gaps, in nearly all cases; less than 0 if not even
        what has to wait for none."""
        if gaps < 0:
            return -1
        root = (math.sqrt(self.CAUTION**2 + 4 * gaps) - self.CAUTION) / 2
        return int(root**2)
