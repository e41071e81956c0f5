"""A server without a model: the real gRPC service, engine and scheduler over steps that take no time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from serve.config import ServerConfig
from serve.engine.engine import InProcessEngine
from serve.served import Served
from serve.server import scraping
from serve.server.ports import Ports
from serve.server.server import shut_down
from serve.server.service import Service
from serve.text.codec import TextCodec
from tests.serve.fakes import ByteTokenizer, served_model

BUCKETS = (4, 16, 64)
MAX_CONTEXT = 2048


@dataclass(frozen=True)
class Handle:
    count: int

    def is_ready(self) -> bool:
        return True

    def samples(self) -> tuple[Sample, ...]:
        return (Sample(65),) * self.count


class Runner:
    """Samples the letter A."""

    def launch(self, step: Step) -> Handle:
        return Handle(sum(entry.samples for entry in step.entries))


@dataclass(frozen=True)
class Listening:
    address: str
    metrics_url: str
    engine: InProcessEngine


@contextlib.contextmanager
def serving() -> Iterator[Listening]:
    """Runs in a thread of its own."""
    found: list[Listening] = []
    up, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        service = Service(ServerConfig(port=0))
        config = SchedulerConfig(
            num_pages=4096, page_size=16, num_slots=128, max_context=MAX_CONTEXT, max_queue=64
        )
        controller = Controller(StepLatencyModel(dict.fromkeys(BUCKETS, 1e-6)))
        scheduler = Scheduler(config, controller, TextCodec(ByteTokenizer()))
        engine = InProcessEngine(scheduler, Runner(), watch=service.metrics.observe_step)
        engine.start()
        service.serve(Served(engine=engine, model=served_model(max_context=MAX_CONTEXT)))
        ports = Ports(service)
        await ports.start()
        url, stop_metrics = scraping.listen(
            "127.0.0.1", 0, {"/metrics": scraping.metrics_page(service.metrics.registry)}
        )
        found.append(Listening(ports.address, f"{url}/metrics", engine))
        up.set()
        await asyncio.to_thread(stop.wait)
        await shut_down(ports, service, timeout=0.0)
        stop_metrics()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    up.wait()
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join()
