"""An engine whose device answers at once, and requests for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller, ControllerConfig
from scheduler.predictor import StepLatencyModel
from scheduler.program import Plan
from scheduler.request import Request, Slo
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from serve.door import News
from serve.engine.engine import InProcessEngine
from tests.serve.conftest import BUCKETS
from tests.serve.lab import NUM_PAGES, NUM_SLOTS, PAGE_SIZE, Letters
from tests.serve.loads import serial
from tests.serve.waiting import Listener

SLO = Slo(tpot=10.0, ttft=60.0)


def scheduler(num_pages: int = NUM_PAGES, **settings: object) -> Scheduler:
    sizes = {"num_pages": num_pages, "page_size": PAGE_SIZE, "num_slots": NUM_SLOTS, "max_context": 512}
    latency = StepLatencyModel(dict.fromkeys(BUCKETS, 1e-3))
    policy, chunk = str(settings.pop("policy", "taper")), int(settings.pop("max_chunk", 512))
    config = SchedulerConfig(**(sizes | settings))
    return Scheduler(config, Controller(latency, policy, ControllerConfig(max_chunk=chunk)), Letters())


@dataclass
class Device:
    """Answers every sample with token 65, and calls `hook` before each step."""

    hook: Callable[[Step], None] = lambda step: None

    def launch(self, step: Step) -> Device:
        self.hook(step)
        return Device.Flown(step)  # type: ignore[return-value]

    @dataclass
    class Flown:
        step: Step

        def is_ready(self) -> bool:
            return True

        def samples(self) -> tuple[Sample, ...]:
            return tuple(Sample(65) for entry in self.step.entries if entry.samples)


def request(id: str, *stages: object, prompt: int = 5) -> Request:
    return Request(id=id, prompt=tuple(range(70, 70 + prompt)), program=Plan(stages=stages), slo=SLO)  # type: ignore[arg-type]


def answer_at_once(engine: InProcessEngine, asked: Request) -> News:
    """What a request that is not taken hears of it, before `submit` returns."""
    listener = Listener()
    engine.submit(asked, listener)
    (news,) = listener.news
    return news


def serve_one(engine: InProcessEngine, tokens: int) -> None:
    engine.start()
    listener = Listener()
    engine.submit(request("r", serial(tokens)), listener)
    listener.wait()
    engine.stop(drain=True, timeout=5)
