"""What encryption and tokens cost: each way to call reaches a server that listens so, and no other."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

import grpc
import pytest

from bench.host.asking import compared
from bench.host.secured import FIGURES, Way, calls, ways
from bench.server import Server
from serve.config import ServerConfig
from serve.config.command_line import configured
from serve.server.tls import certificates_of
from tests.serve.fakes import FakeEngine, listening
from tests.serve.server.own_loop import answer

FEW = argparse.Namespace(connections=2, requests=2, streams=2, tokens=2)


def measured(config: ServerConfig, way: Way) -> dict[str, float]:
    with listening(FakeEngine(answer), config=config, certificates=certificates_of(config)) as address:
        return asyncio.run(calls(Server(os.getpid(), address, "", 0.0), way, FEW))


def test_every_way_is_measured(tmp_path: Path) -> None:
    possible, rows = ways(tmp_path), []
    for name, way in possible.items():
        config = configured(["--port", "0", *way.options])
        rows.append({"way": name, **measured(config, way)})
        assert {*FIGURES} <= rows[-1].keys()
    rows += [{**rows[0], "message_us": 0.0}] * 2  # too few messages for the clock of CPU time
    assert [line.split("  ")[0] for line in compared(rows, FIGURES).splitlines()[1:]] == [*possible]
    with pytest.raises(grpc.aio.AioRpcError):
        measured(config, possible["TLS"])
