"""What probably helps against a failure that has to do with TLS or a token: gRPC says only what happened."""

from __future__ import annotations

import grpc

from .errors import ServiceError

# What gRPC's details hold, and what it means for the server at an address.
_SAID = {
    "WRONG_VERSION_NUMBER": "{} seems to speak no TLS; without tls (--tls), nothing is encrypted",
    "has expired": "the certificate of {} has expired",
    "not yet valid": "the certificate of {} is not valid yet, or this machine's clock is wrong",
    "Hostname Verification": "the certificate of {} is for another name: server_name of Tls"
    " (--tls-server-name) says for which",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of {} is from an authority that is not trusted here:"
    " ca_cert_path of Tls (--tls-ca-cert-path) says who is",
}
_NO_CONNECTION = ("failed to connect to all addresses", "connections to all backends failing")
_HUNG_UP = ("Socket closed", "reset", "Broken pipe", "ALERT")


def hint(failure: ServiceError, address: str, *, encrypted: bool, certified: bool) -> str:
    """Empty: nothing is known.

    encrypted   the client speaks TLS
    certified   it has a certificate of its own
    """
    if failure.reason == "NO_TOKEN":
        return "a token is needed: token=... (--token-file)"
    # A server that answers gives reasons, and a connection that has stood fails in other words.
    is_from_server = failure.code is not grpc.StatusCode.UNAVAILABLE or bool(failure.reason)
    if is_from_server or not any(said in failure.message for said in _NO_CONNECTION):
        return ""
    found = [text.format(address) for said, text in _SAID.items() if encrypted and said in failure.message]
    if found:
        return found[0]
    if not any(said in failure.message for said in _HUNG_UP):
        return ""
    if not encrypted:
        return f"{address} may ask for TLS: tls=True (--tls)"
    if not certified:
        options = "cert_path and key_path of Tls (--tls-cert-path, --tls-key-path)"
        return f"{address} may ask for a certificate: {options}"
    return f"{address} may not take this client's certificate: it has expired, or is from another authority"
