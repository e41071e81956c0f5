"""How long the machine has not run a thread that could have run.

Linux counts, for each thread, the nanoseconds in which it was ready and waited for a core: because other
threads had them all, or because its control group had used up its share. A read takes a microsecond. What a
hypervisor takes away is not in it: that is counted in hundredths of a second, too coarse to explain a step.
"""

from __future__ import annotations

import os
from pathlib import Path


class Pauses:
    """The pauses of the thread that makes it. Where the machine does not count them, there are none."""

    SOURCE = Path("/proc/thread-self/schedstat")  # nanoseconds run, nanoseconds waited, times run

    def __init__(self) -> None:
        try:
            self._file = os.open(self.SOURCE, os.O_RDONLY)  # of this thread, whichever reads it later
        except OSError:
            self._file = None
        self._taken = 0
        self.take()

    def take(self) -> float:
        """Seconds of them since they were last taken."""
        if self._file is None:
            return 0.0
        fields = os.pread(self._file, 96, 0).split()
        before, self._taken = self._taken, int(fields[1]) if len(fields) > 1 else 0
        return 1e-9 * (self._taken - before)

    def close(self) -> None:
        """There are no more of them."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
