"""A server and its engine's process that keep account of themselves, for a soak."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from serve.config import ServerConfig
from serve.door import Watcher
from serve.logs import log_to_stderr
from serve.remote import child
from serve.remote.child import Started, Starter
from tests.serve.remote import slow

LOOK_SECONDS = 0.2
COMPILE = "/jax/core/compile/backend_compile_duration"


def server(engine: str, account: str, *options: str) -> None:
    """Serve by an engine whose process runs the function of this module that `engine` names. How many tasks
    the loop has is written to the file `account`, time and again."""
    from serve.remote.spawn import spawned
    from serve.server.server import serve

    config = tyro.cli(ServerConfig, args=options)

    async def main() -> None:
        counting = asyncio.ensure_future(_count_tasks(Path(account)))
        try:
            await serve(config, load, partial(print, flush=True))
        finally:
            counting.cancel()

    log_to_stderr()
    with spawned(f"{__name__}.{engine}") as load:
        asyncio.run(main())


async def _count_tasks(account: Path) -> None:
    new = account.with_suffix(".new")
    while True:
        new.write_text(str(len(asyncio.all_tasks())))
        new.replace(account)  # whoever reads it finds a number
        await asyncio.sleep(LOOK_SECONDS)


def real(descriptor: int, server: int) -> None:
    child.main(descriptor, server, lambda: _accounted(child.own_engine()))


def fake(descriptor: int, server: int) -> None:
    slow.STEP_SECONDS = 0.003
    child.main(descriptor, server, lambda: _accounted(slow.start))


def _accounted(starter: Starter) -> Starter:
    """Before its process ends, the engine says on standard error what it has left."""

    def start(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None]) -> Started:
        started = starter(config, watch, before_plan)
        compiled: list[str] = []
        if "jax" in sys.modules:
            sys.modules["jax"].monitoring.register_event_duration_secs_listener(
                lambda event, _, **__: compiled.append(event) if event == COMPILE else None
            )
        engine: Any = started.engine
        wait = engine.wait

        def wait_and_tell() -> None:
            wait()
            scheduler = engine.scheduler
            scheduler.check()
            held = scheduler.config.num_slots - scheduler.free_slots
            left = {"kv": scheduler.load().kv_used_tokens, "slots": held, "compiled": len(compiled)}
            sys.stderr.write(f"left {json.dumps(left)}\n")  # at once: the server writes there, too
            sys.stderr.flush()

        engine.wait = wait_and_tell
        return started

    return start
