"""The memory of this process: how much it has, how much it may have, and what it gives back."""

from __future__ import annotations

import contextlib
import ctypes
import resource


def limit(more: int) -> None:
    """What exceeds what there is by `more` bytes raises MemoryError, or ends the process; where the system
    says how large it is."""
    if size := _bytes(0):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = size + more if hard == resource.RLIM_INFINITY else min(size + more, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def resident() -> int:
    """Bytes in memory."""
    return _bytes(1)


def give_back() -> None:
    """Let the system have what is free here; where the C library can do that."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _bytes(place: int) -> int:
    """Of the process: those that have addresses (0), those in memory (1). 0 outside of Linux."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[place]) * resource.getpagesize()
    except OSError:
        return 0
