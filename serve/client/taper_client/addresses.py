"""Whether an address leads to this machine itself, or elsewhere."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Whether a numeric address is this machine's own, also one of IPv4 in the form of IPv6.

    Raises ValueError for what is no such address.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
