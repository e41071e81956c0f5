"""Kinds of keys, of certificates as `openssl` would make them."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from taper_client.certificates import Paths, load
from taper_client.keys import is_usable

# Its length takes two bytes.
NAME = x509.Name(
    [x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, letter * 60) for letter in "abcde"]
)


def certificate(key: Any) -> bytes:
    """For a key, and signed by it."""
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(NAME).issuer_name(NAME).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    is_edwards = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return made.sign(key, None if is_edwards else SHA256()).public_bytes(Encoding.PEM)


USABLE = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
}
OTHERS = {
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "Ed448": ed448.Ed448PrivateKey.generate,
}


@pytest.mark.parametrize("kind", [*USABLE, *OTHERS])
def test_a_certificate_says_of_what_kind_its_key_is(kind):
    pem = certificate((USABLE | OTHERS)[kind]())
    assert is_usable(pem) == (kind in USABLE)
    usable = certificate(USABLE["P-256"]())
    assert is_usable(b"# a remark\n" + pem + usable) == (kind in USABLE), "the first is the server's own"


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_of_no_kind(pem):
    assert not is_usable(pem)


def test_files_with_another_kind_of_key_are_refused_by_name(tmp_path):
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "cert").write_bytes(certificate(key))
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    paths = Paths(str(tmp_path / "cert"), str(tmp_path / "key"))
    with pytest.raises(ValueError, match=r"^--cert: gRPC cannot use keys as that of .*: RSA, and ECDSA"):
        load(paths, Paths("--cert", "--key"), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
