"""What the server's process and a reader's tell each other: pickled, each with its length before it."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from typing import Any, NamedTuple

from serve.api.errors import ServiceError
from serve.reading.work import Answer
from serve.served import ServedModel

LENGTH = struct.Struct("!Q")  # of the pickle that follows


class Begin(NamedTuple):
    """The first message to a reader.

    model   what it reads for, without its tokenizer: that is what the function `tokenizer` gives for `name`
    memory  bytes of address space that reading may add to those of a reader that has read nothing
    """

    model: Any
    tokenizer: str
    name: str
    memory: int


def begin(
    model: ServedModel, name: str, memory: int, tokenizer: str = "serve.reading.child.model_tokenizer"
) -> Begin:
    tokenless: Any = {"tokenizer": None}
    return Begin(replace(model, **tokenless), tokenizer, name, memory)


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
