"""What a request leaves when it has ended is freed at once: full collections of garbage are rare."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step import Step
from serve.engine.engine import InProcessEngine
from serve.reading.requests import read_request
from serve.text.codec import TextCodec
from taper_client import generate_request
from tests.serve.engine.instant import Device
from tests.serve.fakes import ByteTokenizer, served_model
from tests.serve.remote.soak import Soak
from tests.serve.waiting import Listener

SIZES = SchedulerConfig(num_pages=512, page_size=16, num_slots=128, max_context=1000)


@contextmanager
def garbage() -> Iterator[Counter[str]]:
    """The types of objects that only a collection finds unreachable."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(type(each).__name__ for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def requests() -> list[Request]:
    """Of every kind that a soak has."""
    soak = Soak("", requests=1, seconds=1.0, text=False)
    model = served_model(max_context=1000, vocab_size=100)
    asked = [soak.request(random.Random(number)) for number in range(60)]
    return [read_request(generate_request(prompt, **options), model) for prompt, options in asked]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_request_that_has_ended_leaves_no_garbage(cancelled: bool) -> None:
    steps_left = 0

    def hook(step: Step) -> None:
        nonlocal steps_left
        steps_left -= 1
        if cancelled and steps_left <= 0:
            for entry in step.entries:
                engine.cancel(entry.request_id)

    latency = StepLatencyModel({8: 1e-3, 64: 2e-3})
    engine = InProcessEngine(
        Scheduler(SIZES, Controller(latency, "taper"), TextCodec(ByteTokenizer())), Device(hook)
    )
    engine.start()
    with garbage() as left:
        for number, request in enumerate(requests()):
            steps_left, listener = 1 + number % 20, Listener()
            engine.submit(replace(request, id=str(number)), listener)
            while not listener.ended.wait(0.001) and engine.load().scheduler.running_requests:
                pass
        engine.stop(drain=True, timeout=10)
        del request, listener
    assert left == Counter()
