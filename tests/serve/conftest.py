"""Runners are compiled once for all tests of a process, and JAX is imported where one is asked for."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import structlog

from serve.logs import log_to_stderr
from serve.logs.bugs import show_everything

if TYPE_CHECKING:
    from serve.engine.runner import Runner

BUCKETS = (3, 32)


@pytest.fixture(autouse=True)
def no_prompts_yet() -> None:
    """As in a server that has just begun: the log may show what an exception says."""
    show_everything(True)


@pytest.fixture
def restored_log() -> Iterator[None]:
    """What `log_to_stderr` changes is as before, afterwards."""
    hooks, root = (sys.excepthook, threading.excepthook, sys.unraisablehook), logging.getLogger()
    handlers, level = [*root.handlers], root.level
    yield
    log_to_stderr()  # in the form that it has at first
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def exact_runner() -> Runner:
    """float64: a row's result does not depend on the rows beside it beyond 1e-15."""
    from tests.serve.lab import tiny_runner

    return tiny_runner("float64", BUCKETS)


@pytest.fixture(scope="session")
def runner() -> Runner:
    from tests.serve.lab import tiny_runner

    return tiny_runner("float32", BUCKETS)


@pytest.fixture(scope="session")
def default_runner() -> Runner:
    """The default model, the one that forks by itself. Its programs are those of the server in
    test_end_to_end.py, compiled once for all."""
    import jax.numpy as jnp

    from attention.xla import Xla
    from model.checkpoint import load_model
    from serve.engine.runner import Runner, RunnerConfig

    model = load_model("default", jnp.float32)
    runner = Runner(
        model,
        RunnerConfig(num_pages=2048, page_size=16, buckets=(16, 32), num_slots=64, backend=Xla()),
    )
    runner.compile()
    runner.hold(model)
    return runner
