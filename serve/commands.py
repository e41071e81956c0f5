"""The console command `taper-serve`."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn

from model.settings import one_line, out_of_memory
from serve.config import ServerConfig
from serve.config.command_line import configured
from serve.logs import STDERR, say

if TYPE_CHECKING:
    from serve.served import Loader


def serve(args: list[str] | None = None) -> None:
    """Serve a model over gRPC until SIGTERM."""
    config = configured(args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU: the server owns it
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or it logs each handshake that fails, in its own form
    with _engine(config) as load:
        from serve.server.server import EngineFailedError, run

        try:
            run(config, load)
        except (OSError, ValueError, EngineFailedError) as error:
            _leave(str(error))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            _leave(f"not enough memory: {one_line(error)}")


def _leave(why: str) -> NoReturn:
    """End with status 1, whether anybody reads why or not."""
    say(f"taper-serve: {why}", "error")
    STDERR.drain()
    sys.exit(1)


def _engine(config: ServerConfig) -> AbstractContextManager[Loader]:
    """What loads the engine. Importing takes seconds: not for --help, and a process of the engine's begins
    before this one goes on to import its own."""
    if config.engine_in_process:
        from serve.engine.startup import load

        return nullcontext(load)
    from serve.remote.spawn import spawned

    return spawned()
