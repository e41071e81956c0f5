"""Several servers behind one client: gRPC spreads the calls, watches which servers serve, and tries a call
that has brought nothing at another server.

All of it is gRPC's own, by its service config. A call is tried again only until its first message has come:
from then on it is one server's, or the same events would come twice.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Any

from .arguments import TARGET, items, target, wrong_value
from .v1 import inference_service_pb2 as pb

# Refused and broken calls of one moment go to the other servers within less than a second: a server that
# drains has told its watchers by then, and a connection that broke is not chosen any more.
_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": pb.DESCRIPTOR.services_by_name["InferenceService"].full_name},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,  # the most that gRPC knows
                "initialBackoff": "0.05s",
                "backoffMultiplier": 2,
                "maxBackoff": "1s",
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.service_config", json.dumps(_CONFIG)),
    ("grpc.per_rpc_retry_buffer_size", 1 << 25),  # a longer message would not be tried again
    ("grpc.max_reconnect_backoff_ms", 2_000),  # or one that has come back would be left out for minutes
    # The connection to a machine that is gone without a word is given up after 40 seconds. Not sooner, or
    # streams would break where a machine only stands still for a while.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # of gRPC's other pings, which may come first
)
"""Of a channel to several servers."""

_ADDRESS = re.compile(r"\[?(.+?)\]?:(\d+)")


def addresses_of(name: str, value: Any) -> tuple[str, ...]:
    """The addresses that a caller gave: one, several in a text with commas between them, or a list.

    Raises TypeError and ValueError.
    """
    if isinstance(value, str) and "," in value and not TARGET.fullmatch(value):
        value = value.split(",")
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return (target(name, value),)
    given = [target(f"{name}[{index}]", each) for index, each in enumerate(items(name, value, "an address"))]
    if not given:
        raise wrong_value(name, value, "at least one address is needed")
    return tuple(given)


def target_of(addresses: Sequence[str]) -> str:
    """What gRPC calls the servers at these addresses together. Raises ValueError for several that are not
    all numeric: gRPC looks up one name, again and again as it should be, but not several."""
    if len(addresses) == 1:
        return addresses[0]
    places = [_numeric(index, address) for index, address in enumerate(addresses)]
    if all(host.version == 4 for host, _ in places):
        return "ipv4:" + ",".join(f"{host}:{port}" for host, port in places)
    return "ipv6:" + ",".join(f"[{_as_ipv6(host)}]:{port}" for host, port in places)


def is_balanced(addresses: Sequence[str]) -> bool:
    """Whether there may be several servers: also under a name, which may lead to several."""
    if len(addresses) > 1:
        return True
    [address] = addresses
    scheme, _, rest = address.partition(":")
    if scheme in ("ipv4", "ipv6"):
        return "," in rest
    if scheme == "dns":
        return _host(rest.rpartition("/")[2]) is None
    return not TARGET.fullmatch(address) and _host(address) is None


def _numeric(index: int, address: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    host = _host(address)
    if host is None:
        needed = (
            "several addresses must be numeric, as in '10.0.0.5:50051'; servers that have names need one name"
            " that leads to all of them"
        )
        raise wrong_value(f"address[{index}]", address, needed)
    return host, address.rpartition(":")[2]


def _host(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Of a numeric host and port; None for what is anything else."""
    found = _ADDRESS.fullmatch(address)
    try:
        return ipaddress.ip_address(found[1]) if found else None
    except ValueError:
        return None


def _as_ipv6(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"::ffff:{host}" if host.version == 4 else str(host)
