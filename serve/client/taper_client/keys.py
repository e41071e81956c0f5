"""What kind of key a certificate is for: with some, each handshake of gRPC's fails."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

USABLE = "RSA, and ECDSA on P-256 or P-384"

# Object identifiers (RFC 3279, RFC 5480) in DER, each with its header.
_RSA = bytes.fromhex("06092a864886f70d010101")
_ECDSA = bytes.fromhex("06072a8648ce3d0201")
_P256 = bytes.fromhex("06082a8648ce3d030107")
_P384 = bytes.fromhex("06052b81040022")

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_VERSION = 0xA0  # tag of the one field that may be absent
_KEY = 5  # after serial number, signature, issuer, validity and subject (RFC 5280, 4.1)


def is_usable(pem: bytes) -> bool:
    """Whether the first certificate of a PEM file is for a key with which both ends of gRPC can do."""
    try:
        algorithm = _algorithm(pem)
    except (IndexError, ValueError):
        return False
    return algorithm.startswith(_RSA) or algorithm in (_ECDSA + _P256, _ECDSA + _P384)


def _algorithm(pem: bytes) -> bytes:
    """The certificate's AlgorithmIdentifier: what its public key is for, and its parameters."""
    der = base64.b64decode(b"".join(_CERTIFICATE.findall(pem)[0].split()))
    (_, certificate), *_ = _elements(der)
    (_, signed), *_ = _elements(certificate)
    fields = [content for tag, content in _elements(signed) if tag != _VERSION]
    (_, algorithm), *_ = _elements(fields[_KEY])
    return algorithm


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of the elements that follow each other."""
    while der:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start], "big")
        yield tag, der[start : start + length]
        der = der[start + length :]
