"""What it costs to spread calls over servers: `python -m bench.host.replicas`.

    python -m bench.host.replicas --json OUT
    python -m bench.host.replicas --beside "Ray Serve=127.0.0.1:9000"      # and a proxy that is there already

The servers are real ones over a device that is none. A row for each way to call, in turns: milliseconds until
a request has its first message; of streams that get a message at every step, the messages in a second. A way
with several servers has the same streams on all of them together.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import grpc

from bench import result
from bench.command import Command, asked_for
from bench.host.asking import by_grpc, compared, first_messages, streamed
from bench.host.processes import Setting
from bench.host.serving import PROGRAM
from bench.host.strangers import MODEL
from bench.server import started
from bench.timing import python_ms
from taper_client.replicas import OPTIONS, target_of

FIGURES = ("ttft_ms", "messages_per_second")
ALONE = (("grpc.use_local_subchannel_pool", 1),)  # no connection is shared with other channels


def ways(servers: Sequence[str], beside: Sequence[str]) -> Mapping[str, tuple[str, Sequence[Any]]]:
    """Targets of gRPC's, and the options of channels to them."""
    first, both = f"ipv4:{servers[0]}", target_of(servers)
    found = {
        "one connection": (first, ()),
        "balanced, one server": (first, OPTIONS),
        "balanced, two servers": (both, OPTIONS),
    }
    for each in beside:
        name, _, address = each.partition("=")
        found[name] = (address, ())
    return found


async def calls(target: str, channel_options: Sequence[Any], options: Any) -> dict[str, Any]:
    """One row."""
    async with grpc.aio.insecure_channel(target, options=[*ALONE, *channel_options]) as channel:
        ask = by_grpc(channel)
        first = await first_messages(ask, options.requests)
        return {**first, **await streamed(ask, options.streams, options.tokens)}


def command() -> Command:
    parser = Command("bench.host.replicas", "Calls that are spread over servers, beside one connection.")
    add = parser.add_argument
    add("--beside", action="append", default=[], metavar="NAME=ADDRESS", help="one more way")
    add("--rounds", type=int, default=5, help="of all ways, one after the other")
    add("--requests", type=int, default=200, help="one after the other")
    add("--streams", type=int, default=32, help="at once")
    add("--tokens", type=int, default=200, help="of each stream")
    add("--device-ms", type=float, default=1.0, help="a step of the device")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        setting = Setting(device_ms=options.device_ms, launch_ms=0.2, folder=folder, requests=options.streams)
        servers.enter_context(patch.dict(os.environ, setting.environment))
        two = [servers.enter_context(started(MODEL, program=PROGRAM)) for _ in range(2)]
        possible = ways([server.address for server in two], options.beside)
        for _ in range(options.rounds):
            for name, (target, channel_options) in possible.items():
                rows.append({"way": name, **asyncio.run(calls(target, channel_options, options))})
                print(rows[-1], file=sys.stderr, flush=True)
    head = result.head(command().typed(arguments))
    found = {**head, "python_ms": python_ms(), "options": asked_for(options), "rows": rows}
    return result.conclude(found, compared(rows, FIGURES), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
