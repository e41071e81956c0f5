"""What encryption and tokens cost a call: `python -m bench.host.secured`.

    python -m bench.host.secured --json OUT

The server is the real one over a device that is none; its only client has one connection. A row for each way
to call, in turns: milliseconds until a new connection has its first answer, and until a request has its
first token; of streams that get a message at every step, the messages in a second, and the microseconds of
the server's CPU for each.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import grpc
import trustme

from bench.command import Command
from bench.host.asking import by_grpc, concluded, first_messages, setting_of, streamed, ways_command
from bench.host.attackers import CONNECTION
from bench.host.serving import PROGRAM
from bench.host.strangers import MODEL
from bench.load.measures import quantile
from bench.server import Server, started
from bench.timing import clock

MODEL_INFO = "/taper.v1.ControlService/GetModelInfo"
TOKEN = "a-token-of-the-benchmark"
FIGURES = ("connect_ms", "ttft_ms", "messages_per_second", "message_us")

Dial = Callable[[str], grpc.aio.Channel]


class Way(NamedTuple):
    """How the server listens, and how it is called."""

    options: tuple[str, ...]
    dial: Dial
    metadata: tuple[tuple[str, str], ...] = ()


def ways(folder: Path) -> Mapping[str, Way]:
    authority = trustme.CA()
    of_server, of_client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client")
    certificate, key, root, tokens = (
        folder / name for name in ("cert.pem", "key.pem", "ca.pem", "tokens.toml")
    )
    of_server.private_key_pem.write_to_path(key)
    for number, blob in enumerate(of_server.cert_chain_pems):
        blob.write_to_path(certificate, append=number > 0)
    authority.cert_pem.write_to_path(root)
    tokens.write_text(f'[[token]]\ntenant = "bench"\nroles = ["generate"]\ntoken = "{TOKEN}"\n')

    def secure(*pair: bytes) -> Dial:
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), *pair)
        return lambda address: grpc.aio.secure_channel(address, credentials, options=CONNECTION)

    def plain(address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=CONNECTION)

    encrypted = ("--tls-cert-path", str(certificate), "--tls-key-path", str(key))
    mutual = (*encrypted, "--tls-client-ca-cert-path", str(root))
    asked, bearer = ("--tokens", str(tokens)), (("authorization", f"Bearer {TOKEN}"),)
    chain = b"".join(blob.bytes() for blob in of_client.cert_chain_pems)
    return {
        "plain": Way((), plain),
        "tokens": Way(asked, plain, bearer),
        "TLS": Way(encrypted, secure()),
        "mTLS, tokens": Way((*mutual, *asked), secure(of_client.private_key_pem.bytes(), chain), bearer),
    }


async def calls(server: Server, way: Way, options: Any) -> dict[str, Any]:
    """One row."""
    connecting = list[float]()
    for _ in range(options.connections):
        began = clock()
        async with way.dial(server.address) as channel:
            await channel.unary_unary(MODEL_INFO)(b"", metadata=way.metadata)
        connecting.append(1e3 * (clock() - began))
    async with way.dial(server.address) as channel:
        ask = by_grpc(channel, way.metadata)
        return {
            "connect_ms": quantile(connecting, 0.5),
            **await first_messages(ask, options.requests),
            **await streamed(ask, options.streams, options.tokens, server.process),
        }


def command() -> Command:
    parser = ways_command("bench.host.secured", "Encryption and tokens beside neither.")
    parser.add_argument("--connections", type=int, default=30, help="that are opened one after the other")
    return parser


def main(arguments: Sequence[str]) -> dict[str, Any]:
    options = command().parse_args(arguments)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, folder)
        possible = ways(Path(folder))
        with patch.dict(os.environ, setting.environment):
            for _ in range(options.rounds):
                for name, way in possible.items():
                    with started([*MODEL, *way.options], program=PROGRAM) as server:
                        rows.append({"way": name, **asyncio.run(calls(server, way, options))})
                    print(rows[-1], file=sys.stderr, flush=True)
    return concluded(command().typed(arguments), options, rows, FIGURES)


if __name__ == "__main__":
    main(sys.argv[1:])
