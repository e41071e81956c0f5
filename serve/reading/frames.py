"""What the server's process and a reader's tell each other: pickled, each with its length before it."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from typing import Any, NamedTuple

from serve.config import ServerConfig
from serve.logs import LogForm, LogLevel
from serve.reading.work import Answer
from serve.served import ServedModel
from taper_client.errors import ServiceError

TOKENIZER = "serve.reading.child.model_tokenizer"
LENGTH = struct.Struct("!Q")  # of the pickle that follows


class Begin(NamedTuple):
    """The first message to a reader.

    model   what it reads for, without its tokenizer: that is what the function `tokenizer` gives for `name`
    memory  bytes of address space that reading may add to those of a reader that has read nothing
    log     the form and the level of what it writes to the log
    """

    model: Any
    tokenizer: str
    name: str
    memory: int
    log: tuple[LogForm, LogLevel] = ("console", "info")


def begin(model: ServedModel, config: ServerConfig, tokenizer: str = TOKENIZER) -> Begin:
    """As the config says; `tokenizer` is the function that makes the model's."""
    tokenless: Any = {"tokenizer": None}
    log = (config.log_format, config.log_level)
    return Begin(replace(model, **tokenless), tokenizer, config.model, config.read_memory_mb << 20, log)


class Ready(NamedTuple):
    """A reader reads."""


class Told(NamedTuple):
    """What became of a job. `bug` is for the log; a reader that `leaves` ends now."""

    outcome: Answer | ServiceError | None
    bug: str = ""
    leaves: bool = False


def pack(message: object) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data
