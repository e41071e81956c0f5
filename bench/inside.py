"""An engine in this process: what taper-serve would serve with, without a server around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # as taper-serve does, before JAX starts

from model.sharding import ask_for_devices
from scheduler.events import Event, Finished
from scheduler.request import Request
from scheduler.step import FinishedStep
from serve.config import ServerConfig, command_line
from serve.engine import startup
from serve.engine.engine import InProcessEngine
from serve.engine.runner import Runner


@dataclass(frozen=True, slots=True)
class Inside:
    """A started engine, its runner, and what getting ready came to."""

    engine: InProcessEngine
    runner: Runner
    summary: str

    def ask(self, request: Request) -> Future[Finished]:
        """Hand a request in; the future holds how it ended."""
        answered: Future[Finished] = Future()

        def sink(events: Sequence[Event | Any]) -> None:
            if isinstance(events[-1], Finished):
                answered.set_result(events[-1])

        self.engine.submit(request, sink)
        return answered


def configured(arguments: Sequence[str]) -> ServerConfig:
    """What taper-serve would make of these arguments. Call it before anything asks for a device."""
    config = command_line.configured(arguments)
    ask_for_devices(config.tensor_parallel)
    return config


def start(config: ServerConfig, on_step: Callable[[FinishedStep], None] | None = None) -> Inside:
    """Start the engine that taper-serve would start with this config."""
    started = startup.start(config, on_step=on_step)
    return Inside(started.engine, started.runner, str(started.ready))
