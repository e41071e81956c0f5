"""What a gateway adds to a call: `python -m bench.host.gateways`.

    python -m bench.host.gateways --smg PATH/TO/smg --json OUT

The server is the real one over a device that is none. A row for each way to it, in turns: taper.v1, the
engine service that gateways call, and OpenAI's HTTP API of SMG in front of that. Of each: milliseconds until
a request has its first token; of streams that get a message at every step, the messages in a second, and the
microseconds of the server's CPU for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc

from bench.command import Command
from bench.host.asking import (
    PROMPT,
    Ask,
    by_grpc,
    concluded,
    count,
    first_messages,
    setting_of,
    streamed,
    ways_command,
)
from bench.host.attackers import CONNECTION
from bench.host.serving import PROGRAM
from bench.host.strangers import MODEL
from bench.server import Server, free_port, started
from bench.timing import clock
from taper_client import Client

ENGINE = "/vllm.grpc.engine.VllmEngine/Generate"
FIGURES = ("ttft_ms", "messages_per_second", "message_us")
PATIENCE = 60.0  # seconds for a gateway to find its server


def by_engine_service(channel: grpc.aio.Channel) -> Ask:
    from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

    names = itertools.count()

    def ask(tokens: int) -> AsyncIterator[object]:
        asked = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = vllm.GenerateRequest(
            request_id=f"bench-{next(names)}", text=PROMPT, sampling_params=asked, stream=True
        )
        call: Any = channel.unary_stream(ENGINE)(request.SerializeToString())
        return aiter(call)

    return ask


def by_http(port: int, model: str) -> Ask:
    async def ask(tokens: int) -> AsyncIterator[object]:
        """Server-sent events, as they are: parsing JSON would be the client's time."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        data = json.dumps({**body, "temperature": 0}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data)
        try:
            if b" 200 " not in (status := await reader.readline()):
                raise RuntimeError(f"the gateway said {status.decode().strip()}")
            async for line in reader:
                if b"data: {" in line:
                    yield line
        finally:
            writer.close()

    return ask


async def calls(ask: Ask, process: int, options: Any) -> dict[str, float | None]:
    """One row."""
    first = await first_messages(ask, options.requests)
    return {**first, **await streamed(ask, options.streams, options.tokens, process)}


async def rows_of(server: Server, gateway: str, http: Ask, options: Any) -> list[Any]:
    """A row for each way."""
    async with (
        grpc.aio.insecure_channel(server.address, options=CONNECTION) as plain,
        grpc.aio.insecure_channel(gateway, options=CONNECTION) as engine,
    ):
        ways = {
            "taper.v1": by_grpc(plain),
            "engine service": by_engine_service(engine),
            "SMG, HTTP": http,
        }
        return [{"way": name, **await calls(ask, server.process, options)} for name, ask in ways.items()]


@contextlib.contextmanager
def smg(path: str | Path, engines: Sequence[str], log: Path, *options: str) -> Iterator[int]:
    """The port of a gateway to some engines' addresses, which it may not have found yet."""
    port, metrics = free_port(), free_port()
    command = [path, "launch", "--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"]
    command += ["--prometheus-port", str(metrics), *options]
    command += ["--worker-urls", *(f"grpc://{engine}" for engine in engines)]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            yield port
        finally:
            process.kill()


async def answered(ask: Ask) -> None:
    """Until a request is answered."""
    deadline = clock() + PATIENCE
    while True:
        try:
            await count(ask(1))
            return
        except (OSError, RuntimeError):
            if clock() > deadline:
                raise
            await asyncio.sleep(0.2)


def command() -> Command:
    parser = ways_command("bench.host.gateways", "A gateway beside plain gRPC.")
    parser.add_argument("--smg", required=True, help="the gateway's program")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, folder)
        gateway = f"127.0.0.1:{free_port()}"
        listening = ["--gateway-port", gateway.rpartition(":")[2]]
        with (
            patch.dict(os.environ, setting.environment),
            started([*MODEL, *listening], program=PROGRAM) as server,
            Client(server.address) as client,
            smg(options.smg, [gateway], Path(folder) / "smg.log") as port,
        ):
            http = by_http(port, client.model_info().model)
            asyncio.run(answered(http))
            for _ in range(options.rounds):
                rows += asyncio.run(rows_of(server, gateway, http, options))
                print(*rows[-3:], sep="\n", file=sys.stderr, flush=True)
    return concluded(command().typed(arguments), options, rows, FIGURES)


if __name__ == "__main__":
    main(sys.argv[1:])
