"""How a client knows its server, and shows it who it is: TLS, a certificate, a token.

Nothing of it comes from the environment, and a token is in no error, no repr and no log.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from .addresses import is_loopback
from .arguments import text, wrong_type
from .certificates import Paths, load
from .errors import ServiceError, from_rpc
from .hints import hint
from .replicas import OPTIONS, addresses_of, is_balanced, target_of

Token = str | Callable[[], str]
"""A bearer token, or what returns it and is asked for each call."""

# Where systems keep the authorities that they trust. gRPC would ask the environment, and then take its own.
SYSTEM_AUTHORITIES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Red Hat
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # macOS, BSD
)
MAX_TOKEN = 4096  # characters: the headers of a call are 8 KiB at most
_TOKEN = re.compile(rf"[!-~]{{1,{MAX_TOKEN}}}")
_NAMES = Paths(
    "cert_path (--tls-cert-path)", "key_path (--tls-key-path)", "ca_cert_path (--tls-ca-cert-path)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """An encrypted connection to a server that proves its name. The paths are of PEM files, read once.

    ca_cert_path   the authorities that the server's certificate may come from; the system's unless set
    cert_path      this client's own certificate, where the server asks for one; and those that lead from it
                   to its authority
    key_path       the key of that
    server_name    the name in the server's certificate, where the address is another
    """

    ca_cert_path: str | os.PathLike[str] | None = None
    cert_path: str | os.PathLike[str] | None = None
    key_path: str | os.PathLike[str] | None = None
    server_name: str | None = None


def token_file(path: str | os.PathLike[str]) -> Callable[[], str]:
    """A function that reads a token from a file, for each call: the file may be replaced meanwhile. White
    space around the token is left out.

    Raises ValueError if there is no token in the file.
    """

    def read() -> str:
        try:
            with open(path, "rb") as file:
                found = file.read(4 * MAX_TOKEN).strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"token file (--token-file): cannot read {os.fspath(path)!r}: {why}") from None
        return _checked(found.decode("latin-1"), f"the token in {os.fspath(path)!r} (--token-file)")

    read()
    return read


def _checked(token: object, name: str = "token") -> str:
    if not isinstance(token, str):
        raise TypeError(f"{name} is a {type(token).__name__}: a str is needed")
    if not token:
        raise ValueError(f"{name} is empty")
    if not _TOKEN.fullmatch(token):
        what = f"at most {MAX_TOKEN} printable characters of ASCII, without spaces, are possible"
        raise ValueError(f"{name} cannot be sent: {what}")
    return token


class Access:
    """What a client connects with, and brings with each call. Raises TypeError and ValueError.

    plaintext_token   send the token where anybody on the way could read it
    """

    def __init__(
        self,
        address: str | Sequence[str],
        tls: Tls | bool | None,
        token: Token | None,
        plaintext_token: bool,
    ) -> None:
        self.addresses = addresses_of("address", address)
        self._target = target_of(self.addresses)
        if not isinstance(tls, Tls | bool | None):
            raise wrong_type("tls", tls, "True, False or what Tls(...) returns is needed")
        self._tls = Tls() if tls is True else tls or None
        if self._tls is not None and self._tls.server_name is None and len(self.addresses) > 1:
            raise ValueError(
                "several addresses and TLS need server_name of Tls (--tls-server-name): the one name that all"
                " of their certificates have"
            )
        self._token = token
        if token is not None and not callable(token):
            _checked(token)
        if token is not None and self._tls is None and not plaintext_token and not _stays_here(self._target):
            raise ValueError(
                f"without TLS, anybody on the way to {self._shown} could read the token: give tls=True"
                " (--tls), or plaintext_token=True (--plaintext-token) if that does not matter"
            )
        self._must_be_direct = token is not None and self._tls is None and not plaintext_token

    def channel(self, kind: Any) -> Any:
        """A channel of `grpc` or of `grpc.aio`."""
        options = [*OPTIONS] if is_balanced(self.addresses) else []
        if self._tls is None:
            # A proxy that the environment names is not this machine.
            options += [("grpc.enable_http_proxy", 0)] if self._must_be_direct else []
            return kind.insecure_channel(self._target, options)
        name = self._tls.server_name
        options += [] if name is None else [("grpc.ssl_target_name_override", text("server_name", name))]
        return kind.secure_channel(self._target, _credentials(self._tls), options)

    @property
    def _shown(self) -> str:
        return ", ".join(self.addresses)

    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """Of one call."""
        if self._token is None:
            return None
        token = _checked(self._token(), "what token() returned") if callable(self._token) else self._token
        return (("authorization", f"Bearer {token}"),)

    def explained(self, error: Any) -> ServiceError:
        """What a call ended with, from grpc.RpcError, and what may help against it."""
        failure = from_rpc(error)
        certified = self._tls is not None and self._tls.cert_path is not None
        found = hint(failure, self._shown, encrypted=self._tls is not None, certified=certified)
        return failure.hinted(found) if found else failure


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    paths = (tls.cert_path, tls.key_path, tls.ca_cert_path)
    given = Paths(*(None if path is None else os.fspath(path) for path in paths))
    pem = load(given, _NAMES, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    return grpc.ssl_channel_credentials(pem.authorities or _system_authorities(), pem.key, pem.cert)


def _system_authorities() -> bytes | None:
    """None: gRPC's own, as the system's are not found."""
    for path in SYSTEM_AUTHORITIES:
        with contextlib.suppress(OSError):
            return Path(path).read_bytes()
    return None


def _stays_here(address: str) -> bool:
    """Whether all that is sent to a target of gRPC's stays on this machine."""
    scheme, _, rest = address.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme == "dns":
        address = rest.rpartition("/")[2]
    places = rest.split(",") if scheme in ("ipv4", "ipv6") else [address]
    return all(map(_is_here, places))


def _is_here(place: str) -> bool:
    host = place[1:].partition("]")[0] if place.startswith("[") else place.rpartition(":")[0] or place
    if host.lower() == "localhost":
        return True
    try:
        return is_loopback(host)
    except ValueError:
        return False  # a name may lead anywhere
