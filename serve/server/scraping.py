"""The server's few pages over HTTP, /metrics for Prometheus above all.

Each connection has a thread and asks once. One that is slow, silent or open for long keeps nobody waiting:
when there are too many, the oldest is closed, and a scrape is over before it is that.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from serve.server.tls import Certificates
from taper_client.errors import PermissionDeniedError, ServiceError, UnauthenticatedError

log = structlog.get_logger("taper")

MAX_CONNECTIONS = 16
SILENCE_SECONDS = 5.0  # in which nothing comes, or nothing is taken
CONNECTION_SECONDS = 15.0  # of a connection, whatever it does
_POLL_SECONDS = 0.25  # between two looks for such connections, and for the end

Authorize = Callable[[str | None], None]
"""Gets the Authorization header. Raises UnauthenticatedError or PermissionDeniedError."""


class Asked(NamedTuple):
    """What a page may depend on."""

    accept: str
    query: Mapping[str, list[str]]


class Page(NamedTuple):
    """What is sent back."""

    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


Pages = Mapping[str, Callable[[Asked], Page]]
"""What makes each page, by its path."""

OPEN = frozenset({"/"})
"""Paths of pages for everybody: what they show, they ask for at another, with a token where there are any."""


def metrics_page(registry: CollectorRegistry) -> Callable[[Asked], Page]:
    """What a registry holds when it is asked, in the format that is; all of it, or what `name[]` names."""

    def page(asked: Asked) -> Page:
        encode, content_type = _encoder(asked.accept)
        names = asked.query.get("name[]")
        shown: Any = registry.restricted_registry(names) if names else registry
        return Page(content_type, encode(shown))

    return page


def _encoder(accept: str) -> tuple[Callable[[Any], bytes], str]:
    try:
        return choose_encoder(" ".join(accept.split()))  # a header may be folded, what it is copied to not
    except (TypeError, ValueError):  # a version that is none
        return choose_encoder("")


def listen(
    host: str,
    port: int,
    pages: Pages,
    authorize: Authorize = lambda header: None,
    certificates: Certificates | None = None,
) -> tuple[str, Callable[[], None]]:
    """Serve pages, by HTTPS where there are certificates; returns the URL without a path, and what stops it.

    Raises OSError.
    """
    shown = f"[{host}]" if ":" in host else host
    try:
        server = _Server(host, port, pages, authorize, certificates)
    except OSError as error:
        raise OSError(f"cannot listen on {shown}:{port} for metrics: {error.strerror or error}") from error
    thread = threading.Thread(
        target=server.serve_forever, args=(_POLL_SECONDS,), name="taper-metrics", daemon=True
    )
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    scheme = "http" if certificates is None else "https"
    return f"{scheme}://{shown}:{server.server_address[1]}", stop


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(
        self, host: str, port: int, pages: Pages, authorize: Authorize, certificates: Certificates | None
    ) -> None:
        self.pages, self.authorize, self._certificates = pages, authorize, certificates
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # when each began: the oldest is the first
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, address = found[0]
        super().__init__(address, _Handler)  # type: ignore[arg-type]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(SILENCE_SECONDS)
        if self._certificates is not None:
            context = self._certificates.now().context
            # It takes place in the connection's own thread.
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = time.monotonic()
            crowd = [*self._open][: max(0, len(self._open) - MAX_CONNECTIONS)]
        for connection in crowd:
            self._cut(connection)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """At least once per poll."""
        limit = time.monotonic() - CONNECTION_SECONDS
        with self._lock:
            late = [connection for connection, began in self._open.items() if began < limit]
        for connection in late:
            self._cut(connection)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            left = [*self._open]
        for connection in left:
            self._cut(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def _cut(self, connection: socket.socket) -> None:
        """End it under its thread, which closes it."""
        with self._lock:
            self._open.pop(connection, None)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # not TLS's own, which the thread is using

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What the other side did is nothing for the log."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a connection for metrics failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()

    def parse_request(self) -> bool:
        """Answer whatever the verb is; the standard library is left nothing to do."""
        if super().parse_request():
            self._answer()
        return False

    def _answer(self) -> None:
        try:
            asked = urlsplit(self.path)
        except ValueError as error:  # such as http://[/
            self._send(HTTPStatus.BAD_REQUEST, f"{error}\n")
            return
        try:
            if asked.path not in OPEN:
                self.server.authorize(self.headers.get("Authorization"))
        except (UnauthenticatedError, PermissionDeniedError) as error:
            self._refuse(error)
            return
        page = self.server.pages.get(asked.path)
        if page is None:
            self._send(HTTPStatus.NOT_FOUND, f"there is {', '.join(self.server.pages)}\n")
        elif self.command != "GET":
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, "there is GET\n", ("Allow", "GET"))
        else:
            self._make(page, Asked(self.headers.get("Accept", ""), parse_qs(asked.query)))

    def _make(self, page: Callable[[Asked], Page], asked: Asked) -> None:
        try:
            made = page(asked)
        except Exception:
            log.exception("a page failed")
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error\n")
        else:
            self._send_page(made)

    def _refuse(self, error: ServiceError) -> None:
        if isinstance(error, UnauthenticatedError):
            self._send(HTTPStatus.UNAUTHORIZED, f"{error}\n", ("WWW-Authenticate", "Bearer"))
        else:
            self._send(HTTPStatus.FORBIDDEN, f"{error}\n")

    def _send_page(self, page: Page) -> None:
        headers = [("Content-Type", page.content_type), *page.headers]
        body = page.body
        if gzip_accepted(self.headers.get("Accept-Encoding", "")):
            body = gzip.compress(body, compresslevel=1)
            headers.append(("Content-Encoding", "gzip"))
        self._send(HTTPStatus.OK, body, *headers)

    def _send(self, status: HTTPStatus, body: str | bytes, *headers: tuple[str, str]) -> None:
        if isinstance(body, str):
            body = body.encode()
            headers = (*headers, ("Content-Type", "text/plain; charset=utf-8"))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "taper"

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is nothing for the log."""
