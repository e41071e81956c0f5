"""The server's certificate, its key, and the authorities of its clients, read again when their files change.

A handshake gets what the files held last that fits together: garbage, half a file, or a certificate whose
key is still to come, is tried again later. Connections that stand are not disturbed, whatever becomes of the
files.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import structlog

from serve.config import ServerConfig
from serve.server.files import look
from taper_client.certificates import Paths, Pem, load

log = structlog.get_logger("taper")

OPTIONS = Paths("--tls-cert-path", "--tls-key-path", "--tls-client-ca-cert-path")
RETRY_SECONDS = 1.0  # between two looks into files that could not be used and did not change since


class Usable(NamedTuple):
    """What one reading of the files came to: for gRPC, and for the standard library."""

    pem: Pem
    context: ssl.SSLContext


class Certificates:
    """What a handshake uses. Thread-safe. Raises ValueError, by the option's name, for files of no use."""

    def __init__(self, paths: Paths, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths, self._clock = paths, clock
        self._lock = threading.Lock()
        self._looks = self._tried_looks = _looks(paths)
        self._tried_at = clock()
        self._complaint = ""
        self._usable = _usable(paths)

    @property
    def asks_clients(self) -> bool:
        """Whether clients need a certificate of their own."""
        return self._paths.authorities is not None

    def now(self) -> Usable:
        """What the files hold, or what they held when it could be used."""
        with self._lock:
            looks = _looks(self._paths)
            if looks == self._looks:
                self._complaint = ""
            elif self._is_to_be_tried(looks):
                self._try(looks)
            return self._usable

    def _is_to_be_tried(self, looks: tuple[object, ...]) -> bool:
        return looks != self._tried_looks or self._clock() - self._tried_at >= RETRY_SECONDS

    def _try(self, looks: tuple[object, ...]) -> None:
        self._tried_looks, self._tried_at = looks, self._clock()
        try:
            self._usable = _usable(self._paths)
        except ValueError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("the certificate on disk cannot be used; the last one is", why=self._complaint)
            return
        self._looks, self._complaint = looks, ""
        log.info("certificate replaced", path=self._paths.cert)

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC's, which asks before each handshake whether there is something new."""
        given = self.now().pem

        def fetch() -> Any:
            """A ServerCertificateConfiguration, or None where nothing is new."""
            nonlocal given
            pem = self.now().pem
            if pem is given:
                return None
            given = pem
            return _configuration(pem)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given), fetch, require_client_authentication=self.asks_clients
        )


def certificates_of(config: ServerConfig) -> Certificates | None:
    """None: the server speaks no TLS. Raises ValueError, by the option's name, for files of no use."""
    if config.tls_cert_path is None:
        return None
    return Certificates(Paths(config.tls_cert_path, config.tls_key_path, config.tls_client_ca_cert_path))


def _looks(paths: Paths) -> tuple[object, ...]:
    return tuple(path and look(path) for path in paths)


def _usable(paths: Paths) -> Usable:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if paths.authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return Usable(load(paths, OPTIONS, context), context)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    if pem.key is None or pem.cert is None:
        raise ValueError("a server needs a certificate and its key")
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.authorities)
