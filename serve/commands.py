"""The console command `taper-serve`."""

from __future__ import annotations

import os
import sys

import tyro

from model.settings import one_line, out_of_memory
from serve.config import ServerConfig


def serve(args: list[str] | None = None) -> None:
    """Serve a model over gRPC until SIGTERM."""
    config = tyro.cli(ServerConfig, prog="taper-serve", description=serve.__doc__, args=args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU: the server owns it
    from serve.engine.startup import load  # JAX takes seconds to import: not for --help
    from serve.server.server import run

    try:
        run(config, load)
    except (OSError, ValueError) as error:
        sys.exit(f"taper-serve: {error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(f"taper-serve: not enough memory: {one_line(error)}")
