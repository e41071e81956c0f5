"""What the server's process and the engine's tell each other.

They are one program in two processes that trust each other: messages are pickled, and there is one version.
"""

from __future__ import annotations

import pickle
from typing import NamedTuple

from model.config import ModelConfig
from scheduler.request import Request
from serve.config import ServerConfig
from serve.door import Load, News, StepRecord
from serve.served import Platform

# --- to the engine -----------------------------------------------------------------------------------------


class Begin(NamedTuple):
    """The first message: start an engine of this config."""

    config: ServerConfig


class Submit(NamedTuple):
    """Queue a request, which is `handle` from here on. Handles are never used again."""

    handle: int
    request: Request


class Cancel(NamedTuple):
    handle: int


class SetPolicy(NamedTuple):
    policy: str


class Stop(NamedTuple):
    drain: bool
    timeout: float


# --- to the server -----------------------------------------------------------------------------------------


class Up(NamedTuple):
    """The engine serves."""

    model: ModelConfig
    platform: Platform
    policy: str
    load: Load


class Broken(NamedTuple):
    """The engine could not start: the kind of error, one of `ERRORS`, and its text."""

    kind: str
    text: str


class Happened(NamedTuple):
    """What has happened since the last such message: usually, what a step brought.

    tokens  rows of handle, branch, token and count of the branch's tokens, as `serve.remote.rows` packs them
    rare    all that is no plain token, in the order of the rows that stand for it
    steps   that have ended
    load    how busy the engine is now
    failed  what it has died of, if it has
    """

    tokens: bytes
    rare: tuple[News, ...]
    steps: tuple[StepRecord, ...]
    load: Load
    failed: str = ""


Message = Begin | Submit | Cancel | SetPolicy | Stop | Up | Broken | Happened

ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (OSError, ValueError, MemoryError)}
"""Errors of a start that are the operator's to mend, and told in a line."""


def encode(message: Message) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def decode(data: bytes | memoryview) -> Message:
    return pickle.loads(data)
