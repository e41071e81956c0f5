"""Who calls: a tenant, where tokens or certificates tell, and what it may do."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import grpc

from serve.api.errors import PermissionDeniedError
from serve.server.tokens import ROLES, Role, Tokens


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
    """Tells who makes a call: by its token where there are tokens, else by its certificate if it has one."""

    def __init__(self, tokens: Tokens | None = None) -> None:
        self._tokens = tokens

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
        names = context.peer_identities()
        return Caller(connection, next(iter(names)).decode(errors="replace") if names else None)
