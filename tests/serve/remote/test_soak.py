"""A server among clients of every kind leaks nothing: no page, slot, task, descriptor or memory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taper_client import Client
from tests.serve.remote.soak import Soak
from tests.serve.waiting import until

ROOT = Path(__file__).parents[3]
SERVER = "import sys; from tests.serve.remote.soaked import server; server(*sys.argv[1:])"
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20
SPARE = 4  # descriptors that gRPC may open once, as it comes to need them


@dataclass
class Process:
    """What the system knows of one."""

    pid: int
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds, resident bytes

    def sample(self) -> None:
        resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE
        self.memory.append((time.monotonic(), resident))

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def every_minute(self) -> list[float]:
        return [round(size / MIB, 1) for _, size in self.memory[::60]]

    @property
    def mib_per_minute(self) -> float:
        """The slope of its memory in the second half."""
        times, sizes = np.array(self.memory[len(self.memory) // 2 :]).T
        return float(np.polyfit(times - times[0], sizes, 1)[0]) * 60 / MIB


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    account: Path
    said: Path

    def __post_init__(self) -> None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.both = {"server": Process(self.process.pid), "engine": Process(int(children[0]))}

    @property
    def tasks(self) -> int:
        return int(self.account.read_text() or 0)

    def is_empty(self, client: Client) -> bool:
        load = client.load()
        return load.running_requests == load.queued_requests == load.kv_used_tokens == 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Its memory is sampled meanwhile."""
        over = threading.Event()

        def sample() -> None:
            while not over.wait(1.0):
                for each in self.both.values():
                    each.sample()

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def serving(folder: Path, engine: str, *options: str) -> Iterator[Server]:
    account, said = folder / "tasks", folder / "stderr"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, engine, str(account), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("taper-serve ready on "), said.read_text()
        yield Server(process, line.split()[-1], account, said)
    finally:
        process.kill()
        process.communicate(timeout=20)


def soaked(server: Server, requests: int, seconds: float, *, text: bool) -> dict[str, Any]:
    """What a soak comes to. Raises AssertionError if something is left of it."""
    asyncio.run(Soak(server.address, requests // 20, seconds / 20, text=text, seed=1).run())  # warms it up
    idle = at_rest(server)
    soak = Soak(server.address, requests, seconds, text=text)
    began = time.monotonic()
    with server.watched():
        asyncio.run(soak.run())
    took = time.monotonic() - began
    slopes = {name: process.mib_per_minute for name, process in server.both.items()}
    memory = {name: process.memory[-1][1] / MIB for name, process in server.both.items()}
    left = at_rest(server, idle)
    server.process.terminate()
    assert server.process.wait(60) == 0
    said = server.said.read_text()
    found = re.search(r"left (\{.*\})", said)
    assert found is not None, said[-2000:]
    account = json.loads(found[1])
    return {
        "seconds": round(took, 1),
        "ended": dict(sorted(soak.ended.items())),
        "before": idle,
        "after": left,
        "left": account,
        "MiB": {name: round(size, 1) for name, size in memory.items()},
        "MiB/min": {name: round(slope, 2) for name, slope in slopes.items()},
        "MiB every minute": {name: process.every_minute for name, process in server.both.items()},
        "said": [line for line in said.splitlines() if "error" in line or "Traceback" in line],
    }


def at_rest(server: Server, wanted: dict[str, int] | None = None) -> dict[str, int]:
    """Tasks and descriptors once nothing runs: no more than `wanted`, as soon as they are."""

    def found() -> dict[str, int]:
        counts = {f"{name}'s descriptors": each.descriptors for name, each in server.both.items()}
        return {"tasks": server.tasks, **counts}

    with Client(server.address) as client:
        until(lambda: server.is_empty(client), 30)
    if wanted is None:
        time.sleep(2.0)  # connections close
        return found()
    end = time.monotonic() + 20
    while any(found()[name] > most for name, most in wanted.items()) and time.monotonic() < end:
        time.sleep(0.1)
    return found()


def check(figures: dict[str, Any], requests: int) -> None:
    print(json.dumps(figures, indent=1))
    ended = figures["ended"]
    known = {"ok", "HUNG_UP", "ABORTED", "DeadlineExceededError", "QUEUE_FULL", "SLO_UNATTAINABLE"}
    ends = {end: count for end, count in ended.items() if end.partition(": ")[0] not in ("unread", "killed")}
    assert {end for end in ends if end != "policies" and end.partition(": ")[2] not in known} == set()
    assert sum(count for end, count in ends.items() if end != "policies") == requests
    assert ended["whole: ok"] > 0.4 * requests
    left = ("hang up: HUNG_UP", "abort: ABORTED", "deadline: DeadlineExceededError")
    assert sum(ended[end] for end in left) >= 0.3 * requests
    more = {name: figures["after"][name] - before for name, before in figures["before"].items()}
    assert max(more.values()) <= SPARE
    assert figures["left"] == {"kv": 0, "slots": 0, "compiled": 0}
    assert figures["said"] == []


@pytest.mark.full
def test_a_short_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path, "fake") as server:
        check(soaked(server, 60, 4.0, text=False), 60)


@pytest.mark.full
def test_ten_minutes_of_every_kind_of_client_leave_nothing_behind(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    requests, seconds = (pytestconfig.getoption(f"--soak-{name}") for name in ("requests", "seconds"))
    with serving(tmp_path, "real", "--compilation-cache", str(tmp_path / "programs")) as server:
        figures = soaked(server, requests, seconds, text=True)
    check(figures, requests)
    assert max(figures["MiB/min"].values()) < 1.0
