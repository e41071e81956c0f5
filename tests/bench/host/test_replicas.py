"""What it costs to spread calls: each way is measured, and beside them what is there already."""

from __future__ import annotations

import argparse
import asyncio

from bench.host.asking import compared
from bench.host.replicas import FIGURES, calls, ways
from tests.serve.fakes import FakeEngine, listening
from tests.serve.server.own_loop import answer

FEW = argparse.Namespace(requests=2, streams=4, tokens=2)


def test_every_way_is_measured() -> None:
    engines, rows = (FakeEngine(answer), FakeEngine(answer)), []
    with listening(engines[0]) as first, listening(engines[1]) as second:
        possible = ways([first, second], [f"a proxy={second}"])
        for name, (target, options) in possible.items():
            before = [len(engine.requests) for engine in engines]
            rows.append({"way": name, **asyncio.run(calls(target, options, FEW))})
            assert {*FIGURES} <= rows[-1].keys()
            assert sum(len(engine.requests) for engine in engines) == sum(before) + 6
            other = name == "a proxy"  # the second server
            if name != "balanced, two servers":
                assert len(engines[not other].requests) == before[not other]
    assert [line.split("  ")[0] for line in compared(rows, FIGURES).splitlines()[1:]] == [*possible]
