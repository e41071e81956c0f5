"""One side of the engine's process in the place of the other: what a test says to it, and hears."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

from model.config import PRESETS
from scheduler.predictor import PredictionAccuracy
from scheduler.program import Plan, SerialStage
from scheduler.request import Request
from scheduler.scheduler import SchedulerLoad
from scheduler.stopping import Stopping
from serve.door import Load
from serve.remote.channel import Channel
from serve.remote.messages import Message

MODEL = PRESETS["qwen3-0.6b"]
LOAD = Load(SchedulerLoad(1, 2, 3, 4, 5), PredictionAccuracy(), output_tokens_per_second=99.0, steps=7)


def request(id: str) -> Request:
    return Request(id=id, prompt=(1,), program=Plan(stages=(SerialStage(stopping=Stopping(max_tokens=5)),)))


@dataclass
class OtherSide:
    """What a test says and hears in the place of a process."""

    channel: Channel
    heard: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    gone: threading.Event = field(default_factory=threading.Event)

    def listen(self) -> None:
        def serve() -> None:
            self.channel.serve(self.heard.put)
            self.gone.set()

        threading.Thread(target=serve).start()

    def next(self, kind: type[Message]) -> Message:  # type: ignore[valid-type]
        message = self.heard.get(timeout=10)
        assert isinstance(message, kind), message
        return message
