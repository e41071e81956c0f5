"""`taper-health`: whether a server serves, for what asks by running a command, such as a container engine.

Exit codes: 0, it serves; 1, it does not, or does not answer; 2, a wrong flag.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING


def main(args: Sequence[str] | None = None) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what is wrong is said in a line, below
    asked = parser().parse_args(args)
    try:
        with _channel(asked) as channel:
            request = health_pb2.HealthCheckRequest(service=asked.service)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(request, timeout=asked.timeout).status
    except grpc.RpcError as error:
        sys.exit(f"taper-health: {asked.address}: {error.code().name}: {error.details()}")  # type: ignore[attr-defined]
    except OSError as error:
        sys.exit(f"taper-health: cannot read {error.filename}: {error.strerror}")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    if status != _SERVING:
        sys.exit(f"taper-health: {asked.address}: {name}")
    print(name)


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    parser = argparse.ArgumentParser("taper-health", description="Ask a server whether it serves.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="where it listens (%(default)s)")
    parser.add_argument("--service", default="", help="one of its services; all of it unless given")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (%(default)s)")
    parser.add_argument(
        "--tls-ca-cert-path", help="PEM file of the authorities of its certificate: with it, TLS is spoken"
    )
    parser.add_argument("--tls-cert-path", help="PEM file of a certificate, where the server asks for one")
    parser.add_argument("--tls-key-path", help="PEM file of its key")
    parser.add_argument("--tls-server-name", help="the name in the server's certificate")
    return parser


def _channel(asked: argparse.Namespace) -> grpc.Channel:
    """Past any proxy that the environment names. Raises OSError."""
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if asked.tls_ca_cert_path is None:
        return grpc.insecure_channel(asked.address, options)
    if asked.tls_server_name is not None:
        options.append(("grpc.ssl_target_name_override", asked.tls_server_name))
    paths = (asked.tls_ca_cert_path, asked.tls_key_path, asked.tls_cert_path)
    pems = [None if path is None else Path(path).read_bytes() for path in paths]
    return grpc.secure_channel(asked.address, grpc.ssl_channel_credentials(*pems), options)
