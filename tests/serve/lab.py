"""A small random model behind a real engine, and what a run of requests looked like from outside."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from attention import Backend
from attention.xla import Xla
from model.config import ModelConfig
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE, Placement
from model.weights import random_weights
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller, ControllerConfig
from scheduler.events import Event, Finished, StageFinished, StageStarted, TokenEmitted
from scheduler.predictor import StepLatencyModel
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.step import Sample, Step
from scheduler.stopping import FinishReason
from serve.door import Failed
from serve.engine.engine import InProcessEngine
from serve.engine.runner import Runner, RunnerConfig, StepHandle
from tests.compiling import compiled_quickly
from tests.scheduler.alphabet import Pieces

PAGE_SIZE = 4
NUM_PAGES = 320
NUM_SLOTS = 64


class Letters:
    """A codec in which every token is one character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) for token in ids)

    def reader(self, before: Iterable[int], *, special_tokens: bool) -> Pieces:
        return Pieces(chr)


# Hidden size 128: smaller models hide what padding does to a row's rounding.
TINY = ModelConfig(
    name="tiny",
    vocab_size=131,
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=160,
    rope_theta=1e6,
    tie_embeddings=False,
    max_context=512,
)


def tiny_runner(dtype: Any, buckets: Sequence[int]) -> Runner:
    """A compiled runner of a random model."""
    return compiled_runner(tiny_model(dtype), buckets)


def tiny_model(dtype: Any) -> Decoder:
    with compiled_quickly(), jax.enable_x64(jnp.dtype(dtype) == jnp.float64):
        return random_weights(Decoder(TINY, dtype), 7, ON_ONE_DEVICE)


def compiled_runner(
    model: Decoder,
    buckets: Sequence[int],
    backend: Backend | None = None,
    placement: Placement = ON_ONE_DEVICE,
    num_pages: int = NUM_PAGES,
    page_size: int = PAGE_SIZE,
) -> Runner:
    runner = Runner(
        model,
        RunnerConfig(
            num_pages=num_pages,
            page_size=page_size,
            buckets=tuple(buckets),
            num_slots=NUM_SLOTS,
            backend=backend or Xla(),
            max_top_logprobs=4,
            placement=placement,
        ),
    )
    with compiled_quickly():
        runner.compile()
        runner.hold(model)
    return runner


Name = tuple[Any, ...]
"""Of a branch: (label, n-th of that label) from the root; () is the trunk."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request came to, by branch."""

    tokens: Mapping[Name, tuple[int, ...]]
    reasons: Mapping[Name, tuple[FinishReason, ...]]


@dataclass(slots=True)
class Run:
    """Everything that happened to a load."""

    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))
    steps: list[Step] = field(default_factory=list)

    def answers(self) -> dict[str, Answer]:
        return {request_id: answer(events) for request_id, events in self.events.items()}

    def preemptions(self) -> int:
        return sum(
            event.usage.preemptions
            for events in self.events.values()
            for event in events
            if isinstance(event, Finished)
        )


def answer(events: Iterable[Event]) -> Answer:
    events = list(events)
    reasons: dict[Name, list[FinishReason]] = defaultdict(list)
    names = branch_names(events)
    for event in events:
        if isinstance(event, StageFinished):
            reasons[names[event.branch]].append(event.reason)
    return Answer(
        {name: tuple(sample.token for sample in said) for name, said in samples(events).items()},
        {name: tuple(why) for name, why in reasons.items()},
    )


def samples(events: Iterable[Event]) -> dict[Name, list[Sample]]:
    """Every branch's samples, in order."""
    events = list(events)
    names = branch_names(events)
    said: dict[Name, list[Sample]] = defaultdict(list)
    for event in events:
        if isinstance(event, TokenEmitted):
            said[names[event.branch]].append(event.sample)
    return said


def branch_names(events: Iterable[Event]) -> dict[int, Name]:
    """A name for each branch id that does not depend on the order in which branches were opened."""
    names: dict[int, Name] = {0: ()}
    seen: dict[Name, int] = defaultdict(int)
    for event in events:
        if isinstance(event, StageStarted):
            for info in event.branches:
                if info.branch not in names:
                    name = (*names[info.parent], info.label)
                    names[info.branch] = (*name, seen[name])
                    seen[name] += 1
    return names


class Recorder:
    """A runner that remembers the steps it was given."""

    def __init__(self, runner: Runner, steps: list[Step]) -> None:
        self._runner = runner
        self._steps = steps

    def launch(self, step: Step) -> StepHandle:
        self._steps.append(step)
        return self._runner.launch(step)


def run(
    runner: Runner,
    requests: Sequence[Request],
    *,
    buckets: Sequence[int] | None = None,
    codec: Any = None,
    **settings: Any,
) -> Run:
    """Serve `requests` with a fresh scheduler and engine on `runner`, and wait for all of them."""
    buckets = tuple(runner.buckets) if buckets is None else buckets
    latency = StepLatencyModel({bucket: 1e-3 + 2e-4 * bucket for bucket in buckets}, 1e-6)
    control = {name: settings.pop(name) for name in ("max_chunk", "prompt_floor") if name in settings}
    controller = Controller(latency, settings.pop("policy", "taper"), ControllerConfig(**control))
    scheduler = Scheduler(
        SchedulerConfig(
            **{
                "num_pages": runner.config.num_pages,
                "page_size": runner.config.page_size,
                "num_slots": runner.config.num_slots,
                "max_context": runner.model_config.max_context,
                "reserve": 0.0,  # so that some requests are preempted
            }
            | settings
        ),
        controller,
        codec or Letters(),
    )
    record, left, done = Run(), {request.id for request in requests}, threading.Event()
    failures: list[str] = []

    def sink(events: Sequence[Event | Failed]) -> None:
        for event in events:
            if isinstance(event, Failed):
                failures.append(event.error)
                done.set()
                return
            record.events[event.request_id].append(event)
            if isinstance(event, Finished):
                left.discard(event.request_id)
        if not left:
            done.set()

    engine = InProcessEngine(scheduler, Recorder(runner, record.steps))
    engine.start()
    for request in requests:
        engine.submit(request, sink)
    finished = done.wait(120 + len(requests))
    engine.stop(drain=False, timeout=10)
    assert not failures, failures
    assert finished, f"still running: {left}"
    scheduler.check()
    assert scheduler.pool.owned == 0, "pages are left over"
    return record
