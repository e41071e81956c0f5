"""An engine's process without a model: a step takes 20 ms, and every token is an "A"."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

from model.config import PRESETS
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from serve.config import ServerConfig
from serve.door import Watcher
from serve.engine.engine import InProcessEngine
from serve.remote import child
from serve.remote.child import Started
from serve.served import Platform
from serve.text.codec import TextCodec
from tests.serve.fakes import ByteTokenizer

STEP_SECONDS = 0.02
UNLUCKY = 13  # a seed
# Tokens of a prompt whose step never ends, or finds no memory, or ends its thread.
STUCK, GREEDY, LEAVING = 99, 98, 97


class Slow:
    def launch(self, step: Step) -> Slow.Launched:
        given = {token for entry in step.entries for token in entry.tokens or ()}
        if STUCK in given:
            time.sleep(3600)
        if GREEDY in given:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        if LEAVING in given:
            raise SystemExit(0)
        return Slow.Launched(sum(entry.samples for entry in step.entries))

    class Launched:
        def __init__(self, count: int) -> None:
            self._count = count

        def is_ready(self) -> bool:
            return False

        def samples(self) -> tuple[Sample, ...]:
            time.sleep(STEP_SECONDS)
            return (Sample(65),) * self._count


def start(
    config: ServerConfig, watch: Watcher, before_plan: Callable[[], None], *, rows: int = 8, pages: int = 64
) -> Started:
    if config.seed == UNLUCKY:
        raise ValueError("an unlucky number")
    sizes = SchedulerConfig(num_pages=pages, page_size=16, num_slots=2 * rows, max_context=1000)
    controller = Controller(StepLatencyModel({rows: STEP_SECONDS}), config.policy)
    engine = InProcessEngine(
        Scheduler(sizes, controller, TextCodec(ByteTokenizer())),
        Slow(),  # type: ignore[arg-type]
        watch=watch,
        before_plan=before_plan,
    )
    engine.start()
    return Started(engine, PRESETS["qwen3-0.6b"], Platform())


def main(descriptor: int, server: int) -> None:
    print("engine", os.getpid(), file=sys.stderr, flush=True)
    child.main(descriptor, server, lambda: start)


def wide(descriptor: int, server: int) -> None:
    """32 tokens every two milliseconds."""
    global STEP_SECONDS
    STEP_SECONDS = 0.002
    print("engine", os.getpid(), file=sys.stderr, flush=True)
    child.main(descriptor, server, lambda: partial(start, rows=32, pages=4096))


def quiet(descriptor: int, server: int) -> None:
    child.main(descriptor, server, lambda: start)


def deaf(descriptor: int, server: int) -> None:
    """Does not come to listen: it imports what it needs, for instance."""

    def starter() -> child.Starter:
        print("engine", os.getpid(), file=sys.stderr, flush=True)
        time.sleep(60)
        return start

    child.main(descriptor, server, starter)
