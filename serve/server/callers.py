"""Who calls: a tenant, where tokens or certificates tell, and what it may do."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import grpc

from serve.server.tokens import ROLES, Role, Tokens
from taper_client.errors import PermissionDeniedError, UnauthenticatedError

MAX_NAME = 256  # characters of a certificate's


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call.

    connection  the other end's address, as gRPC writes it
    tenant      to whom requests, cached prompts, limits and counters belong; None where nobody is told apart
    """

    connection: str
    tenant: str | None = None
    roles: frozenset[Role] = ROLES

    def check(self, roles: Set[Role]) -> None:
        """Raises PermissionDeniedError if it has none of these roles."""
        if not self.roles & roles:
            text = f"this needs a token with the role {' or '.join(sorted(roles))}"
            raise PermissionDeniedError.because("WRONG_ROLE", text)

    @property
    def client(self) -> str:
        """Whose turn it is and whose limits count: the tenant's, or else the connection's."""
        return self.connection if self.tenant is None else self.tenant

    def salt(self, given: str, *, shared: bool) -> str:
        """Of the prefix cache: that of a tenant is its own, unless tenants have one that is `shared`."""
        return given if self.tenant is None or shared else f"{self.tenant}\0{given}"

    def key(self, request_id: str) -> str:
        """The request's id among those of all tenants. An id has no slash."""
        return request_id if self.tenant is None else f"{self.tenant}/{request_id}"


class Callers:
    """Tells who makes a call: by its token if there are tokens, else by its certificate if all have one."""

    def __init__(self, tokens: Tokens | None = None, *, certificates: bool = False) -> None:
        self._tokens, self._certificates = tokens, certificates

    def check(self, authorization: str | None, roles: Set[Role]) -> None:
        """Let in who brings a header, and has one of the roles. Raises UnauthenticatedError and
        PermissionDeniedError."""
        if self._tokens is not None:
            token = self._tokens.identify(authorization)
            Caller("", token.tenant, token.roles).check(roles)

    def of(self, context: grpc.aio.ServicerContext) -> Caller:
        """Raises UnauthenticatedError."""
        connection = context.peer()
        if self._tokens is not None:
            given = [
                str(value) for key, value in context.invocation_metadata() or () if key == "authorization"
            ]
            token = self._tokens.identify(", ".join(given))  # several are no token
            return Caller(connection, token.tenant, token.roles)
        return Caller(connection, _certified(context) if self._certificates else None)


def _certified(context: grpc.aio.ServicerContext) -> str:
    """The name in a caller's certificate. Raises UnauthenticatedError if it might be another's."""
    names = context.peer_identities() or [b""]
    try:
        name = next(iter(names)).decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable() or len(name) > MAX_NAME:
        text = f"a certificate's name is 1 to {MAX_NAME} characters of printable text"
        raise UnauthenticatedError.because("WRONG_CERTIFICATE", text)
    return name
