"""Processes of the server's own: started with one socket to it, and ended with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def start_process(main: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A process that runs the function `main` of this program, and this end of the socket to it.

    The function gets the descriptor of its own end, and this process's id. Call this from a thread that
    lasts: where the function calls `belong_to`, the process ends with the thread that started it.
    """
    module, _, function = main.rpartition(".")
    ours, theirs = socket.socketpair()
    with theirs:
        # The same modules as here, from wherever they came; -P adds no folder to them.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        program = f"from {module} import {function}; {function}({theirs.fileno()}, {os.getpid()})"
        with _signals_held():
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
            )
    return process, ours


def belong_to(server: int) -> None:
    """In the process: leave signals to the server, whose process id this is, and end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it has ended already
        os._exit(1)


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process started here gets no SIGINT or SIGTERM, which are the server's to act on, before it says what
    becomes of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
