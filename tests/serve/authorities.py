"""Authorities that live as long as a test, and the files of the certificates that they issue."""

from __future__ import annotations

import os
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from taper_client.certificates import Paths

HOST = "127.0.0.1"
_DAY = timedelta(days=1)


class Authority:
    """Issues certificates into a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._issued = folder, 0
        self._authority = trustme.CA()
        self.path = str(folder / "authority.pem")
        self._authority.cert_pem.write_to_path(self.path)

    def issue(self, name: str = HOST, *, expired: bool = False) -> Paths:
        """Files of a new certificate and its key. The third path is this authority's own."""
        now = datetime.now(UTC)
        days = {"not_before": now - 2 * _DAY, "not_after": now - _DAY} if expired else {}
        issued = self._authority.issue_cert(name, **days)
        self._issued += 1
        cert, key = (str(self._folder / f"{self._issued}.{kind}") for kind in ("cert", "key"))
        Path(cert).write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return Paths(cert, key, self.path)


def without_authorities(paths: Paths) -> Paths:
    """For a server that does not ask its clients for certificates."""
    return paths._replace(authorities=None)


def put(source: str | None, target: str | None) -> None:
    """Replace a file at once, as by renaming."""
    assert source is not None
    assert target is not None
    Path(f"{target}.new").write_bytes(Path(source).read_bytes())
    os.replace(f"{target}.new", target)


def presented(address: str) -> bytes:
    """The certificate that a server shows in a new connection, in DER."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


def in_file(path: str | None) -> bytes:
    """The first certificate of a PEM file, in DER."""
    assert path is not None
    text = Path(path).read_text()
    end = "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(text[: text.index(end) + len(end)])
