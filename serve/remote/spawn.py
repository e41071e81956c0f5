"""Starts the engine's process, with one socket between it and this one."""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from serve.processes import start_process

if TYPE_CHECKING:
    from serve.config import ServerConfig
    from serve.door import Watcher
    from serve.served import Loader, Served

GRACE = 10.0  # seconds that the process gets to end


@contextmanager
def spawned(main: str = "serve.remote.child.main") -> Iterator[Loader]:
    """Start the process at once; the loader lets it start the engine that its config asks for. It has ended
    when the context is left.

    `main` is the function that the process runs. Call this from the main thread: the process ends with the
    thread that started it.
    """
    process, ours = start_process(main)

    def load(config: ServerConfig, watch: Watcher) -> Served:
        """Raises what kept the engine from starting."""
        # Imported while the other process imports its own, which takes longer.
        from model.find import model_tokenizer
        from serve.config import naming
        from serve.remote.channel import Channel
        from serve.remote.engine import RemoteEngine
        from serve.served import Served, ServedModel

        patience = config.step_timeout or math.inf
        engine = RemoteEngine(Channel(ours.dup()), watch, process.kill, patience=patience)
        engine.begin(config)
        with naming("model"):
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
