"""The addresses at which a service is called: its methods, who may call each, and gRPC's own limits.

All are at one address, unless reflection and what operators ask have one of their own. What gateways ask
always has: they bring no token, and speak for others.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serve.config import ServerConfig, naming
from serve.server.callers import Callers
from serve.server.health import Health
from serve.server.methods import Behaviour, Method, add_service, full_name
from serve.server.reflection import Reflection
from serve.server.service import Service
from serve.server.servicers import ControlServicer, InferenceServicer
from serve.server.tls import Certificates
from serve.server.tokens import ROLES, Role
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb

SERVICES = (full_name(pb), full_name(control_pb))
MAX_CONTROL_BYTES = 1 << 16  # of every message but those that bring a prompt
MAX_METADATA_BYTES = 1 << 13  # of one call's headers
MAX_ARRIVALS = 1 << 14  # calls that come at one moment: gRPC ends some of more than that, whosever they are
MIN_PING_MS = 10_000  # between two of a client that asks whether the machine is there; gRPC has five minutes

_OF_CALLERS = ("GetModelInfo", "Abort")  # of the control service, what those who ask the model need

Methods = Mapping[Any, Mapping[str, Method]]
"""By the module of a service's stubs, and by name."""


class Ports:
    """A service's gRPC servers, bound to their addresses.

    address  where the model is asked
    control  where the operators' methods are; the same, unless they have an address of their own
    gateway  where gateways ask; None unless they are let in
    """

    def __init__(self, service: Service, certificates: Certificates | None = None) -> None:
        """Raises OptionError if it cannot listen there."""
        config, methods = service.config, _methods(service)
        self._servers: list[grpc.aio.Server] = []
        asked = methods if config.control_port is None else _asked_by_all(methods)
        with naming("port"):
            self.address = self.control = self._bind(service, config.host, config.port, asked, certificates)
        if config.control_port is not None:
            host, port, operators = config.control_host, config.control_port, _of_operators(methods)
            with naming("control_port"):
                self.control = self._bind(service, host, port, operators, certificates)
        self.gateway = None
        if config.gateway_port is not None:
            host, port = config.gateway_host, config.gateway_port
            with naming("gateway_port"):
                self.gateway = self._bind(service, host, port, _of_gateways(service), None, Callers())

    async def start(self) -> None:
        for server in self._servers:
            await server.start()

    async def stop(self, grace: float) -> None:
        """Take no more calls, and end those that are left after `grace` seconds."""
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

    def _bind(
        self,
        service: Service,
        host: str,
        port: int,
        methods: Methods,
        certificates: Certificates | None,
        callers: Callers | None = None,
    ) -> str:
        """The address of a server of its own. `callers` tells who calls, if the service's do not."""
        server = grpc.aio.server(options=_options(service.config))
        host = f"[{host}]" if ":" in host else host
        try:
            if certificates is None:
                bound = server.add_insecure_port(f"{host}:{port}")
            else:
                bound = server.add_secure_port(f"{host}:{port}", certificates.credentials())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from error
        name = f"{_machine(host)}:{bound}"
        for module, named in methods.items():
            add_service(server, module, named, callers or service.callers, name)
        self._servers.append(server)
        return f"{host}:{bound}"


def _machine(host: str) -> str:
    """What tells a server's machine from others: where it listens, or its name if that is everywhere."""
    return socket.gethostname() if host in ("0.0.0.0", "[::]") else host


def _options(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    """gRPC's own limits lie beyond those of the server, which says why it refuses something."""
    return (
        ("grpc.so_reuseport", 0),  # or a second server could take half of the first one's calls
        ("grpc.max_receive_message_length", 4 * config.max_message_bytes),
        ("grpc.max_concurrent_streams", 4 * config.max_client_calls),
        ("grpc.server.max_pending_requests", MAX_ARRIVALS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_ARRIVALS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_MS),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few bytes could become any number
    )


def _large(service: Service, behave: Behaviour) -> Method:
    """One whose message brings a prompt."""
    return Method(behave, service.config.max_message_bytes, service.inference, frozenset({"generate"}))


def _small(service: Service, behave: Behaviour, *roles: Role) -> Method:
    return Method(behave, MAX_CONTROL_BYTES, service.control, frozenset(roles))


def _methods(service: Service) -> Methods:
    large, small = partial(_large, service), partial(_small, service)
    inference, control = InferenceServicer(service), ControlServicer(service)
    health = Health(SERVICES, lambda: service.state == "SERVING")
    reflection = Reflection((*SERVICES, full_name(health_pb2)))
    return {
        pb: {
            "Generate": large(inference.generate)._replace(ended=service.request_ended),
            "Tokenize": large(inference.tokenize),
            "Detokenize": large(inference.detokenize),
        },
        control_pb: {
            "GetModelInfo": small(control.get_model_info, *ROLES),
            "GetServerInfo": small(control.get_server_info, "control", "metrics"),
            "GetLoad": small(control.get_load, "control", "metrics"),
            "Abort": small(control.abort, "generate"),
            "SetPolicy": small(control.set_policy, "control"),
        },
        health_pb2: {"Check": small(health.check), "Watch": small(health.watch)},  # for everybody
        reflection_pb2: {"ServerReflectionInfo": small(reflection.info, *ROLES)},
    }


def _asked_by_all(methods: Methods) -> Methods:
    """Without what only operators need."""
    control = {name: methods[control_pb][name] for name in _OF_CALLERS}
    return {pb: methods[pb], control_pb: control, health_pb2: methods[health_pb2]}


def _of_operators(methods: Methods) -> Methods:
    return {module: named for module, named in methods.items() if module is not pb}


def _of_gateways(service: Service) -> Methods:
    """Raises OSError where the package of their messages is missing."""
    try:
        from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

        from serve.server.gateway.servicer import GatewayServicer
    except ModuleNotFoundError as error:
        raise OSError(f"gateways need more packages: pip install -e '.[gateway]' ({error})") from error
    large, small = partial(_large, service), partial(_small, service)
    servicer = GatewayServicer(service)
    health = Health((full_name(vllm),), lambda: service.state == "SERVING")
    return {
        vllm: {
            "Generate": large(servicer.generate)._replace(ended=service.request_ended),
            "Abort": small(servicer.abort),
            "HealthCheck": small(servicer.health_check),
            "GetModelInfo": small(servicer.get_model_info),
            "GetServerInfo": small(servicer.get_server_info),
            "GetLoads": small(servicer.get_loads),
            "GetTokenizer": small(servicer.get_tokenizer),
        },
        health_pb2: {"Check": small(health.check), "Watch": small(health.watch)},
    }
