"""A server and its engine without a model, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serve.waiting import is_alive

SERVER = """
import signal, sys
from serve.config import ServerConfig
from serve.remote.spawn import spawned
from serve.server.server import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
try:
    with spawned("tests.serve.remote.slow.main") as load:
        config = ServerConfig(port=0, drain_timeout=10.0, step_timeout=3.0, readers=1, seed=int(sys.argv[1]))
        run(config, load)
finally:
    print("imported", [name for name in ("jax", "jaxlib", "flax") if name in sys.modules], flush=True)
"""
ROOT = Path(__file__).parents[3]


@dataclass
class Both:
    server: subprocess.Popen[str]
    engine: int  # process id
    address: str = ""

    @property
    def engine_is_alive(self) -> bool:
        return is_alive(self.engine)


def begun(seed: int = 0, program: str = SERVER, **options: Any) -> Both:
    server = subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **{"env": {**os.environ, "PYTHONPATH": str(ROOT)}, **options},
    )
    assert server.stderr is not None
    line = server.stderr.readline()
    found = re.match(r"engine (\d+)", line)
    assert found, line + server.stderr.read()
    return Both(server, int(found[1]))


def end(both: Both) -> None:
    both.server.kill()
    both.server.communicate(timeout=20)
