"""Bearer tokens: whose each one is, and what it allows. Read from a file, and again whenever that changes.

    [[token]]
    tenant = "search"
    roles = ["generate"]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

A token may stand there itself, as `token = "..."`, or its SHA-256 in hexadecimal digits. A tenant may have
several, so that one can be replaced by another while both count.
"""

from __future__ import annotations

import hashlib
import re
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import structlog

from serve.config import naming
from serve.server.files import look
from taper_client.errors import UnauthenticatedError

log = structlog.get_logger("taper")

Role = Literal["generate", "control", "metrics"]
"""What a caller may do: ask the model, look at the server and steer it, look at the server."""

ROLES: frozenset[Role] = frozenset(get_args(Role))

LOOK_SECONDS = 1.0  # between two looks at whether the file has changed
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[!-~]{16,4096}")  # what fits a header, and cannot be guessed


class Token(NamedTuple):
    """What a token says of whoever brings it."""

    tenant: str
    roles: frozenset[Role]


class Tokens:
    """The tokens of a file, by their digests; a file that cannot be read leaves those of before."""

    def __init__(self, path: str) -> None:
        """Raises OptionError for what is no such file."""
        self._path = Path(path).expanduser()
        self._seen = look(self._path)
        with naming("tokens"):
            self._known = _read(self._path)
        self._looked = time.monotonic()

    def identify(self, authorization: str | None) -> Token:
        """Whose token an `authorization` header brings. Raises UnauthenticatedError."""
        self._look()
        if not authorization:
            text = "this server asks for a token: send it as `authorization: Bearer TOKEN`"
            raise UnauthenticatedError.because("NO_TOKEN", text)
        scheme, _, token = authorization.partition(" ")
        # The digest is looked up, and not the token: what a comparison of digests takes tells nothing of it.
        known = self._known.get(_digest(token.strip()))
        if scheme.lower() != "bearer" or known is None:
            raise UnauthenticatedError.because("WRONG_TOKEN", "this server does not know the token")
        return known

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        seen = look(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            if self._path.is_fifo():
                raise ValueError(f"{self._path}: a pipe, for which everybody would wait")
            self._known = _read(self._path)
            log.info("tokens read again", file=str(self._path), tokens=len(self._known))
        except (OSError, ValueError) as error:
            log.error("the tokens of before still count", error=str(error))


def _read(path: Path) -> Mapping[str, Token]:
    """Raises OSError and ValueError."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML
        raise ValueError(f"{path}: {error}") from None
    entries = tables.pop("token", None)
    if tables or not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: it has [[token]] tables, one at the least, and nothing else")
    known: dict[str, Token] = {}
    for number, entry in enumerate(entries, 1):
        try:
            digest, token = _entry(entry)
        except ValueError as error:
            raise ValueError(f"{path}: token {number}: {error}") from None
        if digest in known:
            raise ValueError(f"{path}: token {number} is there twice")
        known[digest] = token
    return known


def _entry(entry: Any) -> tuple[str, Token]:
    """An entry's digest, and what it says. Raises ValueError, which does not show the token."""
    if not isinstance(entry, dict) or not {*entry} <= {"tenant", "roles", "token", "sha256"}:
        raise ValueError("it has a tenant, roles, and token or sha256")
    tenant, roles, token, digest = (entry.get(name) for name in ("tenant", "roles", "token", "sha256"))
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise ValueError("tenant is 1 to 64 of A-Z a-z 0-9 . _ -")
    if not isinstance(roles, list) or not roles or not all(role in get_args(Role) for role in roles):
        raise ValueError(f"roles are some of {', '.join(sorted(ROLES))}")
    if (token is None) == (digest is None):
        raise ValueError("one of token and sha256 is needed")
    if token is not None:
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise ValueError("token is at least 16 characters of ASCII without spaces")
        digest = _digest(token)
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest.lower()):
        raise ValueError("sha256 is 64 hexadecimal digits")
    return digest.lower(), Token(tenant, frozenset(roles))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
