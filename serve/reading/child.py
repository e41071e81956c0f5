"""A reader's process: it reads one message after the other, and may be killed at any time."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serve.logs import expect_prompts, log_to_stderr
from serve.logs.bugs import trace
from serve.processes import belong_to
from serve.reading import memory
from serve.reading.frames import LENGTH, Begin, Ready, Told, pack
from serve.reading.work import Job, Reader
from taper_client.errors import OverloadedError, ServiceError

_GROWN = 1 << 27  # bytes that it may keep between two messages


def main(descriptor: int, server: int) -> None:
    """The process: its end of the socket, and the server's process id."""
    belong_to(server)
    log_to_stderr()
    end = socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        begin = _receive(end)
        log_to_stderr(*begin.log)
        reader = Reader.of(replace(begin.model, tokenizer=_tokenizer(begin)))
        gc.collect()
        gc.freeze()
        base = memory.resident()
        memory.limit(begin.memory)
        expect_prompts()
        end.sendall(pack(Ready()))
        while True:
            told = tell(reader.read, _receive(end))
            leaves = told.leaves or _has_grown(base)
            end.sendall(pack(told._replace(leaves=leaves)))
            if leaves:
                break
    os._exit(0)


def tell(read: Callable[[Job], Any], job: Job) -> Told:
    """What becomes of a job, whatever reading it does."""
    try:
        return Told(read(job))
    except ServiceError as error:
        error.__traceback__ = error.__context__ = None
        return Told(error)
    except MemoryError:
        return Told(too_costly("memory"), leaves=True)
    except Exception as bug:
        return Told(None, bug=trace(bug))


def too_costly(what: str) -> OverloadedError:
    return OverloadedError.because(
        "PROMPT_TOO_COSTLY", f"reading this message takes more {what} than one message may take"
    )


def model_tokenizer(name: str) -> Any:
    """The tokenizer of a model as an operator names it."""
    from model.find import model_tokenizer

    return model_tokenizer(name)[0]


def _tokenizer(begin: Begin) -> Any:
    module, _, function = begin.tokenizer.rpartition(".")
    return getattr(importlib.import_module(module), function)(begin.name)


def _receive(end: socket.socket) -> Any:
    return pickle.loads(_exactly(end, LENGTH.unpack(_exactly(end, LENGTH.size))[0]))


def _exactly(end: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = end.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return data


def _has_grown(base: int) -> bool:
    """Whether what one message took is not given back."""
    if memory.resident() < base + _GROWN:
        return False
    gc.collect()
    memory.give_back()
    return memory.resident() >= base + _GROWN
