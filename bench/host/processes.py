"""The two processes of a server whose device is none, and what each of them counts of its own work.

Everything the host does for a step is done, for the sizes of Qwen3-32B on a GPU; the call of a program only
sleeps, and its result is there when the device would have ended. `Setting` comes by the environment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from serve.config import ServerConfig
from serve.config.command_line import configured
from serve.door import StepRecord, Watcher
from serve.engine.pauses import Pauses
from serve.served import Loader, Served, ServedModel

VARIABLE = "TAPER_BENCH_HOST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Milliseconds that a step takes the device and its launch the host; where the processes' counts go; and
    how many requests take part in a step that counts."""

    device_ms: float
    launch_ms: float
    folder: str
    requests: int

    @classmethod
    def here(cls) -> Self:
        return cls(**json.loads(os.environ[VARIABLE]))

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


class Counts:
    """CPU seconds of a process over the steps that count, and of each part that is told of.

    A part's *wait* is what its calls took beyond their CPU time and the machine's pauses: where they wait for
    nothing else, time in which another thread had the interpreter.
    """

    def __init__(self, setting: Setting) -> None:
        self._requests = setting.requests
        self._steps: list[float] = []  # CPU seconds of the process at the end of each
        self._parts: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._pauses: dict[int, Pauses] = {}  # by thread
        self._writing = threading.Lock()

    def step(self, record: StepRecord) -> None:
        if record.requests == self._requests:
            self._steps.append(time.process_time())

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted under this name."""

        def counted(*arguments: Any, **options: Any) -> Any:
            pauses = self._pauses_here()
            pauses.take()
            wall, cpu = time.perf_counter(), time.thread_time()
            result = call(*arguments, **options)
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            self._parts[name].append((cpu, max(0.0, wall - cpu - pauses.take())))
            return result

        return counted

    def on(self, owner: Any, *methods: str) -> None:
        """Count these methods of an object from now on, each under its own name."""
        for method in methods:
            setattr(owner, method, self.part(method, getattr(owner, method)))

    def write(self, path: Path) -> None:
        """Once: the engine is waited for by two threads, and its process ends with the first of them."""
        with self._writing:
            if not path.exists():
                path.write_text(json.dumps(self._found()))

    def _found(self) -> dict[str, Any]:
        count = max(1, len(self._steps) - 1)
        cpu = (self._steps[-1] - self._steps[0]) / count if self._steps else 0.0
        parts = {
            name: {"cpu_ms": 1e3 * float(np.median(of[:, 0])), "wait_ms": 1e3 * float(np.mean(of[:, 1]))}
            for name, of in ((name, np.array(calls[-count:])) for name, calls in self._parts.items())
        }
        return {"steps": count, "cpu_ms": 1e3 * cpu, "parts": parts}

    def _pauses_here(self) -> Pauses:
        thread = threading.get_ident()
        if thread not in self._pauses:
            self._pauses[thread] = Pauses()
        return self._pauses[thread]


# --- a device that is none ---------------------------------------------------------------------------------


class Tokens:
    """A step's samples, which are there when it has ended."""

    def __init__(self, values: np.ndarray, end: float) -> None:
        self._values, self._end = values, end

    def copy_to_host_async(self) -> None:
        """There is nothing to copy."""

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._end

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        time.sleep(max(0.0, self._end - time.perf_counter()))
        return self._values


class Device:
    """Runs one step after the other, each for as long."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._free = 0.0
        self._rng = np.random.default_rng(0)

    def run(self, samples: int, alternatives: int) -> tuple[Tokens, ...]:
        """A launch, and what it samples, with log-probabilities.

        It sleeps without the interpreter's lock, as a program's call hardly holds it. The device does not
        wait for the caller to get the lock back.
        """
        reached = time.perf_counter() + self._setting.launch_ms / 1e3
        time.sleep(self._setting.launch_ms / 1e3)
        self._free = max(self._free, reached) + self._setting.device_ms / 1e3
        tokens, wide = self._rng.integers(0, 250, samples), (samples, alternatives)
        outputs = tokens, np.zeros(samples), np.zeros(wide, int), np.zeros(wide)
        return tuple(Tokens(values, self._free) for values in outputs)


def runner_on(device: Device, config: ServerConfig) -> Any:
    """A `Runner` whose programs are run by `device`: it never compiles, and holds nothing."""
    import jax.numpy as jnp

    from attention import backend_named
    from model.decoder import Decoder
    from model.find import model_config
    from model.sampling import SampleOutputs
    from model.sharding import ON_ONE_DEVICE, Placement
    from model.step import StepLayout
    from model.weights import place_model
    from serve.engine import runner

    @dataclass(frozen=True, slots=True)
    class Program:
        layout: StepLayout

        def __call__(self, weights: Any, cache: Any, slots: Any, packed: Any, uses: int) -> Any:
            del weights, packed, uses
            outputs: Any = device.run(self.layout.samples, config.max_top_logprobs)
            return cache, slots, SampleOutputs(*outputs)

    class Nowhere(Placement):
        """Compiles programs that change nothing."""

        __slots__ = ()

        def compile(self, *_: Any, **__: Any) -> Any:
            return lambda slots, *_: slots

    assert config.page_size is not None
    assert config.buckets is not None
    assert config.num_pages is not None
    sizes = runner.RunnerConfig(
        num_pages=config.num_pages,
        page_size=config.page_size,
        buckets=config.buckets,
        num_slots=2 * max(config.buckets),
        backend=backend_named("gpu"),
        placement=Nowhere(),
    )
    runner.compile_step = lambda *_, layout, **__: Program(layout)  # type: ignore[assignment]
    made = runner.Runner(place_model(Decoder(model_config(config.model), jnp.bfloat16), ON_ONE_DEVICE), sizes)
    made.compile()
    made.weights = made.cache = made.slots = None  # type: ignore[assignment]
    return made


# --- the processes -----------------------------------------------------------------------------------------


def start(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None], counts: Counts) -> Any:
    """A started engine over no device, with what it does for a step counted; and its model's config."""
    from model.find import model_config, model_tokenizer
    from scheduler.controller import Controller
    from scheduler.predictor import StepLatencyModel
    from scheduler.scheduler import Scheduler
    from serve.engine import packing, runner, startup
    from serve.engine.collector import Collector
    from serve.engine.engine import InProcessEngine
    from serve.engine.step_log import StepLog
    from serve.text.codec import TextCodec

    config, setting = config.for_platform("gpu"), Setting.here()
    if config.engine_in_process:
        sys.setswitchinterval(startup.SWITCH_SECONDS)
    made = runner_on(Device(setting), config)
    assert config.buckets is not None
    latency = StepLatencyModel(dict.fromkeys(config.buckets, setting.device_ms / 1e3))
    model, (tokenizer, _) = model_config(config.model), model_tokenizer(config.model)
    scheduler = Scheduler(
        startup.scheduler_config(config, made.config, model.max_context),
        Controller(latency, config.policy, startup.controller_config(config, max(config.buckets))),
        TextCodec(tokenizer),
    )
    counts.on(scheduler, "schedule", "update")
    runner.step_inputs = counts.part("lay out", packing.step_inputs)  # type: ignore[attr-defined]
    counts.on(made, "launch")

    def watched(record: StepRecord) -> None:
        tell(record)
        counts.step(record)

    tell = counts.part("tell", watch)
    engine = InProcessEngine(
        scheduler,
        made,
        watch=watched,
        step_log=StepLog(Path(setting.folder) / "steps"),
        collector=Collector(),
        before_plan=counts.part("hear", before_plan),
    )
    engine.start()
    return engine, model


def engine(descriptor: int, server: int) -> None:
    """The engine's process."""
    from serve.remote import child
    from serve.served import Platform

    counts = Counts(Setting.here())

    def begin(config: ServerConfig, watch: Watcher, before_plan: Callable[[], None]) -> child.Started:
        made, model = start(config, watch, before_plan, counts)
        wait = made.wait

        def counted() -> None:
            wait()
            counts.write(Path(Setting.here().folder) / "engine")

        made.wait = counted
        device = Platform(largest_bucket=512, unloaded_step=Setting.here().device_ms / 1e3)
        return child.Started(made, model, device)

    child.main(descriptor, server, lambda: begin)


def serve(arguments: Sequence[str]) -> None:
    """The server's process, with the engine in it if the arguments say so."""
    from model.find import model_tokenizer
    from serve.remote.spawn import spawned
    from serve.server.server import run

    config, setting = configured(arguments), Setting.here()
    counts, folder = Counts(setting), Path(setting.folder)

    def inside(config: ServerConfig, watch: Watcher) -> Served:
        made, model = start(config, watch, lambda: None, counts)
        return Served(engine=made, model=ServedModel.of(config, model, model_tokenizer(config.model)[0]))

    def counting(load: Loader) -> Loader:
        def counted(config: ServerConfig, watch: Watcher) -> Served:
            def watched(record: StepRecord) -> None:
                watch(record)
                counts.step(record)

            return load(config, watched)

        return counted

    if config.engine_in_process:
        run(config, inside)
        counts.write(folder / "engine")
    else:
        with spawned("bench.host.processes.engine") as remote:
            run(config, counting(remote))
        counts.write(folder / "server")
