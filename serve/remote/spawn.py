"""Starts the engine's process, with one socket between it and this one."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.config import ServerConfig
    from serve.door import Watcher
    from serve.served import Loader, Served

GRACE = 10.0  # seconds that the process gets to end


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process started here gets no SIGINT or SIGTERM, which are the server's to act on, before it says what
    becomes of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def spawned(main: str = "serve.remote.child.main") -> Iterator[Loader]:
    """Start the process at once; the loader lets it start the engine that its config asks for. It has ended
    when the context is left.

    `main` is the function that the process runs. Call this from the main thread: the process ends with the
    thread that started it.
    """
    module, _, function = main.rpartition(".")
    ours, theirs = socket.socketpair()
    with theirs:
        # The same modules as here, from wherever they came; -P adds no folder to them.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        program = f"from {module} import {function}; {function}({theirs.fileno()}, {os.getpid()})"
        with _signals_held():
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
            )

    def load(config: ServerConfig, watch: Watcher) -> Served:
        """Raises what kept the engine from starting."""
        # Imported while the other process imports its own, which takes longer.
        from model.find import model_tokenizer
        from serve.remote.channel import Channel
        from serve.remote.engine import RemoteEngine
        from serve.served import Served, ServedModel

        patience = config.step_timeout or math.inf
        engine = RemoteEngine(Channel(ours.dup()), watch, process.kill, patience=patience)
        engine.begin(config)
        tokenizer, _ = model_tokenizer(config.model)
        up = engine.up()
        model = ServedModel.of(config, up.model, tokenizer, up.platform.unloaded_step)
        return Served(engine=engine, model=model, platform=up.platform)

    try:
        yield load
    finally:
        with ours, contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)  # for every copy: the process sees that nobody is here
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
