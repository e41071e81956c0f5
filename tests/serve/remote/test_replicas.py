"""Servers as the processes that they are, and one client of all: some are drained, some are killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.server import free_port
from taper_client import Client, ServiceError
from taper_client.events import Delta, Finished
from tests.serve.remote.both import Both, begun, end
from tests.serve.waiting import until

REQUESTS, AT_ONCE, TOKENS = 200, 32, 4


@dataclass
class Outcome:
    """Of a request: who answered, how many of its messages had tokens, and what it failed of."""

    server: str
    deltas: int
    error: ServiceError | None = None


@dataclass
class Run:
    """All requests, some of them at once. `ended`: by now."""

    client: Client
    outcomes: list[Outcome] = field(default_factory=list)
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(AT_ONCE))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, count: int) -> None:
        for _ in range(count):
            self._threads.submit(self._ask)

    def wait(self, ended: int) -> None:
        until(lambda: len(self.outcomes) >= ended, 60)

    def _ask(self) -> None:
        outcome = Outcome("", 0)
        stream = self.client.generate([1], max_tokens=TOKENS, ignore_eos=True)
        try:
            for event in stream:
                outcome.deltas += isinstance(event, Delta)
            assert isinstance(event, Finished)
        except ServiceError as error:
            outcome.error = error
        outcome.server = stream.server
        with self._lock:
            self.outcomes.append(outcome)

    def check(self, killed: str) -> None:
        """No request failed but those of the killed server that had brought a token."""
        assert len(self.outcomes) == REQUESTS
        failed = [each for each in self.outcomes if each.error is not None]
        assert all(each.server == killed and each.deltas for each in failed), failed
        assert len(failed) <= 8, "it has so many rows"


@contextlib.contextmanager
def three() -> Iterator[list[Both]]:
    made = [begun() for _ in range(3)]
    try:
        for each in made:
            assert each.server.stdout is not None
            each.address = each.server.stdout.readline().split()[-1]
        yield made
    finally:
        for each in made:
            end(each)


def test_of_200_requests_none_fails_that_had_brought_no_token_when_servers_leave() -> None:
    with (
        three() as (drained, killed, stays),
        Client([each.address for each in (drained, killed, stays)]) as client,
    ):
        run = Run(client)
        run.begin(REQUESTS)
        run.wait(REQUESTS // 5)
        drained.server.terminate()
        run.wait(2 * REQUESTS // 5)
        killed.server.kill()
        run.wait(REQUESTS)
        run.check(killed.address)
        answered = Counter(each.server for each in run.outcomes)
        assert answered.keys() == {drained.address, killed.address, stays.address}
        assert answered[stays.address] > REQUESTS // 2
        assert drained.server.wait(15) == 0


@contextlib.contextmanager
def taper_serve(port: int, cache: str) -> Iterator[subprocess.Popen[str]]:
    program = str(Path(sys.executable).with_name("taper-serve"))
    command = [
        program,
        "--port",
        str(port),
        "--compilation-cache",
        cache,
        "--buckets",
        "8",
        "--num-pages",
        "64",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("taper-serve ready")
            yield process
        finally:
            process.kill()


@pytest.mark.full
def test_one_of_two_is_replaced_and_then_the_other_killed(compiled: str) -> None:
    ports = free_port(), free_port()
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with (
        taper_serve(ports[0], compiled) as leaving,
        taper_serve(ports[1], compiled) as dying,
        Client(addresses, timeout=60) as client,
    ):
        run = Run(client)
        run.begin(REQUESTS // 2)
        run.wait(REQUESTS // 8)
        leaving.terminate()
        run.wait(REQUESTS // 2)
        assert leaving.wait(30) == 0
        with taper_serve(ports[0], compiled):
            until(lambda: client.complete([1], max_tokens=1).server == addresses[0], 20)
            run.begin(REQUESTS // 2)
            run.wait(REQUESTS * 5 // 8)
            dying.kill()
            run.wait(REQUESTS)
            run.check(addresses[1])
