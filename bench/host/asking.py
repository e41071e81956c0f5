"""What the ways to a server are compared by: the time to a first message, and messages of streams.

A way is a function that asks for so many tokens and gives the messages as they come.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from bench import result
from bench.command import Command, asked_for
from bench.host.attackers import GENERATE
from bench.host.processes import Setting
from bench.load.measures import quantile
from bench.timing import clock, python_ms
from taper_client import generate_request

PROMPT = "Name three rivers."

Ask = Callable[[int], AsyncIterator[object]]
"""The messages of a request for so many tokens."""


def by_grpc(channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]] = ()) -> Ask:
    """By taper.v1, as bytes: reading them would be the client's time."""

    def ask(tokens: int) -> AsyncIterator[object]:
        request = generate_request(PROMPT, max_tokens=tokens, ignore_eos=True)
        call: Any = channel.unary_stream(GENERATE)(request.SerializeToString(), metadata=tuple(metadata))
        return aiter(call)

    return ask


async def first_messages(ask: Ask, requests: int) -> dict[str, float | None]:
    """Milliseconds until a request's first message, of requests one after the other."""
    first = list[float]()
    for _ in range(requests):
        began, stream = clock(), ask(1)
        await anext(stream)
        first.append(1e3 * (clock() - began))
        async for _ in stream:
            pass
    return {"ttft_ms": quantile(first, 0.5), "ttft_p99_ms": quantile(first, 0.99)}


async def streamed(ask: Ask, streams: int, tokens: int, process: int | None = None) -> dict[str, float]:
    """Messages in a second of streams at once; and the microseconds of a process' CPU for each."""
    began, cpu = clock(), 0.0 if process is None else cpu_seconds(process)
    messages = sum(await asyncio.gather(*(count(ask(tokens)) for _ in range(streams))))
    found = {"messages_per_second": messages / (clock() - began)}
    if process is not None:
        found["message_us"] = 1e6 * (cpu_seconds(process) - cpu) / messages
    return found


async def count(stream: AsyncIterator[object]) -> int:
    return sum([1 async for _ in stream])


def cpu_seconds(process: int) -> float:
    """Of a process until now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ways_command(name: str, what: str) -> Command:
    """With the options that all such benchmarks have."""
    parser = Command(name, what)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="of all ways, one after the other")
    add("--requests", type=int, default=200, help="one after the other")
    add("--streams", type=int, default=32, help="at once")
    add("--tokens", type=int, default=200, help="of each stream")
    add("--device-ms", type=float, default=1.0, help="a step of the device")
    return parser


def setting_of(options: Any, folder: str) -> Setting:
    """A device that is none, for a server that has the streams at once."""
    return Setting(device_ms=options.device_ms, launch_ms=0.2, folder=folder, requests=options.streams)


def concluded(
    typed: str, options: Any, rows: Sequence[dict[str, Any]], figures: Sequence[str]
) -> dict[str, Any]:
    """The result of the rows, written and said. `typed`: the command."""
    found = {**result.head(typed), "python_ms": python_ms(), "options": asked_for(options), "rows": rows}
    return result.conclude(found, compared(rows, figures), options.json)


def compared(rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> str:
    """The medians of each `way` of the rows, beside their ratio to those of the first."""
    medians = dict[str, dict[str, float]]()
    for way in dict.fromkeys(row["way"] for row in rows):
        its = [row for row in rows if row["way"] == way]
        medians[way] = {name: quantile([row[name] for row in its], 0.5) or 0.0 for name in figures}
    base = next(iter(medians.values()))
    lines = [f"{'':<24}" + "".join(f"{name:>24}" for name in figures)]
    for way, found in medians.items():
        ratios = {name: found[name] / base[name] if base[name] else math.nan for name in figures}
        cells = [f"{found[name]:.2f} ({ratios[name]:.2f})" for name in figures]
        lines.append(f"{way:<24}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
