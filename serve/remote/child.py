"""The engine's process: starts an engine, does what the server's process says, and tells it what happens.

It ends with the server: when the socket between them closes, and, where the system can do that, when the
server's process dies. Signals are the server's to act on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import structlog

from model.config import ModelConfig
from model.settings import one_line, out_of_memory
from serve.config import ServerConfig
from serve.door import Engine, Failed, News, StepRecord, Watcher, is_last
from serve.logs import STDERR, expect_prompts, log_to_stderr
from serve.logs.bugs import what
from serve.processes import belong_to
from serve.remote.channel import Channel
from serve.remote.messages import (
    ERRORS,
    Begin,
    Broken,
    Cancel,
    Message,
    SetPolicy,
    Stop,
    Submit,
    Up,
)
from serve.remote.outgoing import Outgoing
from serve.served import Platform

log = structlog.get_logger("taper")

FLUSH_SECONDS = 5.0  # for the server to take the last messages


class WaitableEngine(Engine, Protocol):
    def wait(self) -> None:
        """Until it has stopped, or failed."""
        ...


class Started(NamedTuple):
    """An engine that serves, the config of its model and what it runs on."""

    engine: WaitableEngine
    model: ModelConfig
    platform: Platform


Starter = Callable[[ServerConfig, Watcher, Callable[[], None]], Started]
"""Starts an engine that tells the watcher of its steps, and calls the function before it plans one."""


class EngineHost:
    """Runs the engine behind a channel."""

    def __init__(self, channel: Channel, start: Starter, gone: Callable[[], None]) -> None:
        """`gone` is called when the server is there no more, and has not said that it would leave."""
        self._channel, self._start, self._gone = channel, start, gone
        self._outgoing = Outgoing(channel)
        self._config: queue.SimpleQueue[ServerConfig] = queue.SimpleQueue()
        self._engine: WaitableEngine | None = None
        self._requests: dict[int, str] = {}  # ids of those that have not ended

    def run(self) -> int:
        """From the server's first word to the engine's end; returns the exit status of the process."""
        threading.Thread(target=self._listen, name="taper-commands", daemon=True).start()
        try:
            engine, model, platform = self._start(self._config.get(), self._step, self._receive)
        except Exception as error:
            self._channel.send(broken(error))
            self._channel.close(FLUSH_SECONDS)
            return 1
        self._engine = engine
        self._channel.send(Up(model, platform, engine.policy, engine.load()))
        engine.wait()
        self._outgoing.send(engine.load, last=True, failed=engine.failure)
        self._channel.close(FLUSH_SECONDS)
        return int(bool(engine.failure))

    def _listen(self) -> None:
        try:
            self._channel.serve(self._handle, caught_up=self._tell)
        except Exception:
            log.exception("bug: the engine hears the server no more")
        if self._engine is None or self._engine.state in ("SERVING", "DRAINING"):
            self._gone()

    def _receive(self) -> None:
        """Act on what has arrived, before a step is planned."""
        with contextlib.suppress(EOFError):  # `_listen` sees it too
            self._channel.receive(self._handle)

    def _handle(self, message: Message) -> None:
        if isinstance(message, Begin):
            self._config.put(message.config)
            return
        engine = self._engine
        assert engine is not None, "the server asks for nothing until the engine is up"
        if isinstance(message, Submit):
            self._submit(engine, message)
        elif isinstance(message, Cancel):
            if (name := self._requests.pop(message.handle, None)) is not None:
                engine.cancel(name)
        elif isinstance(message, SetPolicy):
            engine.set_policy(message.policy)
        elif isinstance(message, Stop):
            stop = {"drain": message.drain, "timeout": message.timeout}
            threading.Thread(target=engine.stop, kwargs=stop, name="taper-stop", daemon=True).start()
        self._tell()

    def _submit(self, engine: WaitableEngine, message: Submit) -> None:
        """A bug that only this request meets is told to its caller, as it would be in one process."""
        handle, request = message
        self._requests[handle] = request.id
        try:
            engine.submit(request, partial(self._news, handle))
        except Exception as bug:
            log.exception("bug", request_id=request.id)
            self._news(handle, [Failed(what(bug))])

    def _news(self, handle: int, news: Sequence[News]) -> None:
        if is_last(news[-1]):
            self._requests.pop(handle, None)
        self._outgoing.news(handle, news)

    def _step(self, record: StepRecord) -> None:
        self._outgoing.step(record)
        self._tell()

    def _tell(self) -> None:
        if self._engine is not None:
            self._outgoing.send(self._engine.load)


def broken(error: Exception) -> Broken:
    """An error of the start: the operator's to mend in a line, a bug with its traceback here."""
    if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
        return Broken("MemoryError", one_line(error))
    for name, kind in ERRORS.items():
        if isinstance(error, kind):
            return Broken(name, str(error))
    log.exception("the engine did not start", exc_info=error)
    return Broken("", repr(error))


def own_engine() -> Starter:
    """What starts the engine of `serve.engine` on this machine's devices."""
    from serve.engine import startup  # imports JAX: seconds, in which the server gets to listen

    def start(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None]) -> Started:
        started = startup.start(config, watch=watch, before_plan=before_plan)
        return Started(started.engine, started.runner.model_config, started.platform)

    return start


def main(descriptor: int, server: int, starter: Callable[[], Starter] = own_engine) -> None:
    """The process: its end of the socket, and the server's process id."""
    belong_to(server)
    log_to_stderr()
    channel, start = Channel(socket.socket(fileno=descriptor)), starter()

    def logged(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None]) -> Started:
        log_to_stderr(config.log_format, config.log_level)
        started = start(config, watch, before_plan)
        expect_prompts()
        return started

    status = EngineHost(channel, logged, partial(os._exit, 1)).run()
    STDERR.drain()
    os._exit(status)  # a compilation cannot be interrupted, and crashes under an interpreter that finalizes
