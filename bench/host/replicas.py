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

from bench.command import Command
from bench.host.asking import by_grpc, concluded, first_messages, setting_of, streamed, ways_command
from bench.host.serving import PROGRAM
from bench.host.strangers import MODEL
from bench.server import started
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
    parser = ways_command("bench.host.replicas", "Calls that are spread over servers, beside one connection.")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=ADDRESS", help="one more way")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        setting = setting_of(options, folder)
        servers.enter_context(patch.dict(os.environ, setting.environment))
        two = [servers.enter_context(started(MODEL, program=PROGRAM)) for _ in range(2)]
        possible = ways([server.address for server in two], options.beside)
        for _ in range(options.rounds):
            for name, (target, channel_options) in possible.items():
                rows.append({"way": name, **asyncio.run(calls(target, channel_options, options))})
                print(rows[-1], file=sys.stderr, flush=True)
    return concluded(command().typed(arguments), options, rows, FIGURES)


if __name__ == "__main__":
    main(sys.argv[1:])
