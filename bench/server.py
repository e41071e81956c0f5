"""A taper-serve in a process of its own, started for a benchmark and ended with it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from bench.timing import clock

PROGRAM = "from serve.commands import serve; serve()"
READY = re.compile(r"taper-serve ready on (\S+:\d+)")
PATIENCE = 60.0  # seconds that it gets to stop


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready. `ready_seconds`: from its start until it said so."""

    process: int
    address: str
    metrics_url: str
    ready_seconds: float


@contextmanager
def started(
    arguments: Sequence[str], log: TextIO | None = None, program: str | None = None, *, quiet: bool = False
) -> Iterator[Server]:
    """Start taper-serve, or another `program`, with these arguments on a free port, and drain it at the end.

    What it prints goes to `log` (standard error unless given); what it logs, too, if it is to be `quiet`.
    Raises ChildProcessError if it does not start.
    """
    said: TextIO = log or sys.stderr
    began, metrics = clock(), free_port()
    command = [
        sys.executable,
        "-c",
        program or PROGRAM,
        "--port",
        "0",
        "--metrics-port",
        str(metrics),
        *arguments,
    ]
    errors = subprocess.STDOUT if quiet else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        echo = threading.Thread(target=said.writelines, args=(process.stdout,))
        try:
            address = _ready(process.stdout, said)
            if address is None:
                raise ChildProcessError(f"taper-serve did not start: it ended with {process.wait()}")
            echo.start()
            yield Server(process.pid, address, f"http://127.0.0.1:{metrics}/metrics", clock() - began)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            if echo.ident is not None:
                echo.join()


def _ready(lines: Iterable[str], log: TextIO) -> str | None:
    """Its address as soon as it says so; None if it ends before."""
    for line in lines:
        log.write(line)
        if found := READY.search(line):
            return found[1]
    return None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
