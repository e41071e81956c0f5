"""Certificates in PEM files, looked at before gRPC gets them: it says little of what is wrong with one.

Both sides of a connection have the same three files: a certificate (with those that lead to its authority),
its key, and the authorities that the other side's certificate may come from.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import NamedTuple

from .keys import USABLE, is_usable


class Paths(NamedTuple):
    """Where the files are, or what the options are called that say it. None: there is no such file."""

    cert: str | None = None
    key: str | None = None
    authorities: str | None = None


class Pem(NamedTuple):
    """What the files hold."""

    cert: bytes | None
    key: bytes | None
    authorities: bytes | None


def load(paths: Paths, names: Paths, context: ssl.SSLContext) -> Pem:
    """What is in the files, which fit together; `context` uses it from here on.

    Raises ValueError with the name of the option whose file is wrong: it cannot be read, is no PEM, is the
    key of another certificate, is encrypted or of another kind; or all of them were being replaced.
    """
    if (paths.cert is None) != (paths.key is None):
        given, missing = (names.cert, names.key) if paths.cert else (names.key, names.cert)
        raise ValueError(f"{missing} is missing: {given} is of no use without it")
    before = _read(paths, names)
    for path, name in ((paths.cert, names.cert), (paths.authorities, names.authorities)):
        if path is not None:
            _check_certificates(path, name)
    if paths.authorities is not None:
        context.load_verify_locations(paths.authorities)
    if paths.cert is not None:
        _load_pair(paths, names, context)
        if not is_usable(before.cert or b""):
            raise ValueError(
                f"{names.cert}: gRPC cannot use keys as that of {paths.cert!r}: {USABLE} are possible"
            )
    if _read(paths, names) != before:
        raise ValueError("the files of certificate and key are being replaced")
    return before


def _read(paths: Paths, names: Paths) -> Pem:
    def read(path: str | None, name: str | None) -> bytes | None:
        if path is None:
            return None
        try:
            with open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"{name}: cannot read {path!r}: {why}") from None

    return Pem(*map(read, paths, names))


def _check_certificates(path: str, name: str | None) -> None:
    with contextlib.suppress(ssl.SSLError, OSError):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(path)
        if context.cert_store_stats()["x509"]:
            return
    raise ValueError(f"{name}: {path!r} holds no certificate in PEM")


def _load_pair(paths: Paths, names: Paths, context: ssl.SSLContext) -> None:
    def refuse() -> str:  # or OpenSSL would ask for a password on the terminal
        raise ValueError(
            f"{names.key}: the key in {paths.key!r} is encrypted: one without a password is needed"
        )

    try:
        context.load_cert_chain(str(paths.cert), paths.key, password=refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"the key in {paths.key!r} is not that of the certificate in {paths.cert!r}"
        elif error.reason in ("NO_START_LINE", "BAD_END_LINE", "BAD_BASE64_DECODE", None) or "PEM" in str(
            error
        ):
            why = f"{paths.key!r} holds no key in PEM"
        else:
            why = f"{paths.key!r} and {paths.cert!r} cannot be used: {error.reason}"
        raise ValueError(f"{names.key}: {why}") from None
    except OSError as error:  # it was there a moment ago
        raise ValueError(f"{names.key}: cannot read {paths.key!r}: {error.strerror or error}") from None
