"""Starts the server's engine in the benchmark's own process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # as taper-serve does, before JAX starts

import tyro

from scheduler.step import FinishedStep
from serve.config import ServerConfig
from serve.engine import startup
from serve.engine.engine import Engine
from serve.engine.runner import Runner
from serve.engine.step_log import StepLog


def start(
    arguments: Sequence[str], on_step: Callable[[FinishedStep], None] = lambda finished: None
) -> tuple[Engine, Runner, str]:
    """The engine that taper-serve would serve with, its runner, and what getting ready came to."""
    config = tyro.cli(ServerConfig, prog="taper-serve", args=[*arguments])
    steps = StepLog(Path(config.step_log)) if config.step_log else None

    def observe(finished: FinishedStep) -> None:
        on_step(finished)
        if steps:
            steps.observe_step(finished)

    backend = startup.load(config, observe)
    return backend.engine, cast(Runner, backend.engine.runner), backend.summary
