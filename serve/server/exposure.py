"""Who could reach the server, and what is not in their way."""

from __future__ import annotations

import socket

import structlog

from taper_client.addresses import is_loopback

log = structlog.get_logger("taper")


def warn_of_exposure(hosts: list[str], *, encrypted: bool, tokens: bool, client_certificates: bool) -> None:
    """Say in the log what an address beyond this machine lacks. `hosts` are what the server listens on."""
    open_hosts = sorted({host for host in hosts if not is_local(host)})
    if not open_hosts:
        return
    if not tokens and not client_certificates:
        told = "whoever reaches this address may use the server, and abort what others ask"
        log.warning(told, addresses=open_hosts, see="--tokens")
    if not encrypted:
        travels = "prompts, answers and tokens" if tokens else "prompts and answers"
        log.warning(
            f"{travels} pass unencrypted", addresses=open_hosts, see="--tls-cert-path, --tls-key-path"
        )


def warn_of_open_gateway(host: str) -> None:
    """Say in the log that a gateway's address leads beyond this machine, whatever else is protected."""
    if not is_local(host):
        told = "whoever reaches the gateway's address may use the model, unencrypted and without a token"
        log.warning(told, addresses=[host], see="--gateway-host")


def is_local(host: str) -> bool:
    """Whether only this machine reaches it: its addresses are all loopback, or it is a socket file."""
    if host.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, None, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False
    return all(is_loopback(str(address[0])) for *_, address in found)
