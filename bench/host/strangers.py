"""What one hostile client costs sixteen ordinary ones: `python -m bench.host.strangers`.

    python -m bench.host.strangers --json OUT                  # every kind of attacker, one after the other
    python -m bench.host.strangers --kinds flood,watch

The server is the real one over a device that is none, with limits for each client; everybody has a connection
of their own, and the attacker a process of its own. A row for each kind of attacker: the time to the first
token and between messages that the others see, beside what they see without any.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import grpc

from bench import result
from bench.command import Command, asked_for, names
from bench.host.attackers import CONNECTION, GENERATE, KINDS
from bench.host.processes import Setting
from bench.host.serving import PROGRAM
from bench.load.measures import quantile
from bench.server import started
from bench.timing import clock, python_ms
from taper_client import generate_request

LIMITS = ("--max-client-running", "16", "--max-client-queue", "16")
MODEL = ("--model", "default", "--num-pages", "4000", "--buckets", "8", "64")
SETTLING = 1.0  # seconds that an attacker gets before anybody is measured


class Seen:
    """Seconds to first messages and between two messages, and what else than an answer came."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.failed: list[str] = []

    def figures(self) -> dict[str, Any]:
        return {
            "answers": len(self.first),
            "failed": len(self.failed),
            **{f"ttft_p{q}_ms": quantile([1e3 * each for each in self.first], q / 100) for q in (50, 99)},
            **{f"gap_p{q}_ms": quantile([1e3 * each for each in self.gaps], q / 100) for q in (50, 99)},
        }


async def ordinary(address: str, until: float, tokens: int, seen: Seen) -> None:
    """One client, who asks again as soon as there is an answer."""
    async with grpc.aio.insecure_channel(address, options=CONNECTION) as channel:
        generate: Any = channel.unary_stream(GENERATE)
        while clock() < until:
            request = generate_request("Name three rivers.", max_tokens=tokens, ignore_eos=True)
            sent, last = clock(), 0.0
            try:
                async for _ in generate(request.SerializeToString()):
                    now = clock()
                    (seen.gaps if last else seen.first).append(now - (last or sent))
                    last = now
            except grpc.aio.AioRpcError as error:
                seen.failed.append(f"{error.code().name}: {error.details()}")
                await asyncio.sleep(0.1)


async def crowd(address: str, options: Any) -> dict[str, Any]:
    seen, until = Seen(), clock() + options.seconds
    async with asyncio.TaskGroup() as clients:
        for _ in range(options.clients):
            clients.create_task(ordinary(address, until, options.tokens, seen))
    return seen.figures()


def beside(kind: str | None, address: str, options: Any) -> dict[str, Any]:
    """What the crowd sees beside an attacker."""
    if kind is None:
        return {"attacker": "nobody", **asyncio.run(crowd(address, options))}
    command = ["nice", "-n", "10", sys.executable, "-m", "bench.host.attackers", kind, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
        try:
            assert attacker.stdout is not None
            attacker.stdout.readline()  # it is about to begin
            asyncio.run(asyncio.sleep(SETTLING))
            return {"attacker": kind, **asyncio.run(crowd(address, options))}
        finally:
            attacker.kill()


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what each figure is relative to that without an attacker, the mean of all such rows."""
    alone = [row for row in rows if row["attacker"] == "nobody"]
    figures = ("ttft_p99_ms", "gap_p99_ms")
    base = {name: sum(row[name] or 0.0 for row in alone) / len(alone) for name in figures}
    return [
        {**row, **{f"{name[:-3]}_ratio": row[name] and row[name] / base[name] for name in figures}}
        for row in rows
    ]


def text(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["attacker       answers  failed  TTFT p50, p99 ms (ratio)      gaps p50, p99 ms (ratio)"]
    for row in rows:
        cells = [
            f"{row[f'{name}_p50_ms'] or 0:>8.1f},{row[f'{name}_p99_ms'] or 0:>8.1f} "
            f"({row[f'{name}_p99_ratio'] or 0:.2f})"
            for name in ("ttft", "gap")
        ]
        head = f"{row['attacker']:<14}{row['answers']:>8}{row['failed']:>8}"
        lines.append(head + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def command() -> Command:
    parser = Command("bench.host.strangers", "One hostile client beside ordinary ones.")
    add = parser.add_argument
    add("--kinds", type=names, default=[*KINDS], help=f"of {', '.join(KINDS)}")
    add("--clients", type=int, default=16, help="that are ordinary")
    add("--seconds", type=float, default=8.0, help="beside each attacker")
    add("--tokens", type=int, default=24, help="of an ordinary answer")
    add("--device-ms", type=float, default=20.0, help="a step of the device")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device_ms=options.device_ms, launch_ms=1.0, folder=folder, requests=options.clients)
        with (
            patch.dict(os.environ, setting.environment),
            started([*MODEL, *LIMITS], program=PROGRAM) as server,
        ):
            beside(None, server.address, options)  # everybody is up
            attackers = [None, *options.kinds, None]
            rows = list[dict[str, Any]]()
            for kind in attackers:
                rows.append(beside(kind, server.address, options))
                print(rows[-1], file=sys.stderr, flush=True)
            rows = compared(rows)
    head = result.head(command().typed(arguments))
    found = {**head, "python_ms": python_ms(), "options": asked_for(options), "rows": rows}
    return result.conclude(found, text(rows), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
