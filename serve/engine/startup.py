"""From a config to a started engine: weights, programs, the size of the KV pool, the measured staircase."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import structlog

from attention import Backend, backend_named, default_backend
from model.checkpoint import ModelSource
from model.decoder import Decoder
from model.find import model_tokenizer
from model.progress import SaidSometimes
from model.sharding import Placement, ask_for_devices
from model.tokenizer import Tokenizer
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller, ControllerConfig
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import FinishedStep
from serve.config import OptionError, ServerConfig, naming
from serve.door import Watcher
from serve.engine.calibration import MOST_OFF, conditions, load_profile, matching, misses
from serve.engine.collector import Collector
from serve.engine.compiled import keep_compiled_programs
from serve.engine.engine import InProcessEngine
from serve.engine.memory import MemoryPlan, device_limit, remembered
from serve.engine.programs import ProgramCount
from serve.engine.ready import Ready
from serve.engine.runner import Runner, RunnerConfig
from serve.engine.step_log import StepLog
from serve.served import Platform, Served, ServedModel
from serve.text.codec import TextCodec

log = structlog.get_logger("taper")

# Beside a server in the same process, a step takes the interpreter back a dozen times: it should not wait 5
# ms each time. In a process of its own it made no difference (bench.host).
SWITCH_SECONDS = 0.0005
NOMINAL_PAGES = 2048  # on a device that does not say how much memory it has; and to size a step with


@dataclass(frozen=True, slots=True)
class Started:
    """A started engine, the runner behind it, its model as clients see it, and what getting ready came to."""

    engine: InProcessEngine
    runner: Runner
    model: ServedModel
    ready: Ready

    @property
    def platform(self) -> Platform:
        return Platform(
            device=self.ready.device,
            devices=self.ready.runner.placement.count,
            largest_bucket=self.runner.buckets.largest,
            page_size=self.runner.config.page_size,
            unloaded_step=self.ready.latency.rows_seconds(1),
            summary=str(self.ready),
        )


def load(config: ServerConfig, watch: Watcher) -> Served:
    """Get ready and start what `config` asks for, in the server's process. Raises as `start` does."""
    sys.setswitchinterval(SWITCH_SECONDS)
    started = start(config, watch=watch)
    return Served(engine=started.engine, model=started.model, platform=started.platform)


def start(
    config: ServerConfig,
    *,
    watch: Watcher | None = None,
    on_step: Callable[[FinishedStep], None] | None = None,
    before_plan: Callable[[], None] = lambda: None,
) -> Started:
    """Load the model while every program compiles, measure their times and start the engine.

    `watch`, `on_step` and `before_plan` are the engine's. Raises what is wrong with the config or the model
    folder, before anything is served.
    """
    ask_for_devices(config.tensor_parallel)
    count = ProgramCount()
    config = config.for_platform(jax.default_backend())
    programs = keep_compiled_programs(config.compilation_cache)
    with naming("step_log"):
        step_log = StepLog(Path(config.step_log)) if config.step_log else None  # before anything takes long
    with naming("model"):
        tokenizer, known, found = _find(config)
    with naming("tensor_parallel"):
        placement = Placement.over(found.config, config.tensor_parallel, peer_memory=config.peer_memory)
    began, dtype = time.perf_counter(), jnp.dtype(config.dtype)
    with jax.enable_x64(config.dtype == "float64"), ThreadPoolExecutor(max_workers=1) as compiler:
        shapes = found.abstract(dtype, placement)
        _check_names(config, shapes, placement)
        log.info("starting", model=found.config.name, buckets=len(config.buckets or ()))
        compiling = compiler.submit(_compiled_runner, config, shapes, placement, programs)
        told = SaidSometimes(lambda size: log.info("loading weights", loaded=size))
        model = found.load(dtype, placement, seed=config.seed, watch=told)
        jax.block_until_ready(model.split()[1])
        loaded = time.perf_counter() - began
        log.info("weights are on the device", seconds=round(loaded, 1))
        runner, compiled, memory = compiling.result()
        runner.hold(model, known)
    device = placement.devices[0].device_kind
    latency, source = predictor_for(config, runner, device)
    unloaded = latency.rows_seconds(1)
    if 1e3 * unloaded > config.tpot_slo_ms:
        figures = {"target_ms": config.tpot_slo_ms, "step_ms": round(1e3 * unloaded, 2)}
        log.warning("the default target of the time between tokens cannot be kept for anybody", **figures)
    served = ServedModel.of(config, model.config, tokenizer, unloaded)
    ready = Ready(
        model=model.config,
        dtype=dtype.name,
        device=device,
        runner=runner.config,
        memory=memory,
        latency=latency,
        latency_source=source,
        load_seconds=loaded,
        compile_seconds=compiled,
        seconds=time.perf_counter() - began,
    )
    controller = Controller(latency, config.policy, controller_config(config, runner.buckets.largest))
    scheduling = scheduler_config(config, runner.config, served.max_context)
    engine = InProcessEngine(
        Scheduler(scheduling, controller, TextCodec(tokenizer)),
        runner,
        on_step=on_step,
        watch=watch,
        step_log=step_log,
        collector=Collector(),
        before_plan=before_plan,
        programs=count.now,
    )
    count.serving()
    engine.start()
    return Started(engine, runner, served, ready)


# --- what each part is told --------------------------------------------------------------------------------


def scheduler_config(config: ServerConfig, runner: RunnerConfig, max_context: int) -> SchedulerConfig:
    return SchedulerConfig(
        num_pages=runner.num_pages,
        page_size=runner.page_size,
        num_slots=runner.num_slots,
        max_context=max_context,
        max_queue=config.max_queue,
        max_client_queue=config.max_client_queue or math.inf,
        max_client_running=config.max_client_running or math.inf,
        max_client_kv=math.inf if config.max_client_kv is None else config.max_client_kv,
        reserve=config.reserve,
        prefix_cache=config.prefix_cache,
    )


def controller_config(config: ServerConfig, largest_bucket: int) -> ControllerConfig:
    return ControllerConfig(
        rho=config.rho,
        fill=config.fill,
        repay=config.repay,
        max_chunk=config.max_chunk or largest_bucket,
    )


# --- getting ready -----------------------------------------------------------------------------------------


def _find(config: ServerConfig) -> tuple[Tokenizer, Collection[int] | None, ModelSource]:
    """What a config names: the tokenizer, the ids that may be sampled, and the model.

    Says where their files contradict each other.
    """
    tokenizer, known = model_tokenizer(config.model)
    found = ModelSource.find(config.model, config.load_format)
    for note in (*tokenizer.notes, *found.notes):
        log.warning(note, model=config.model)
    return tokenizer, known, found


def _compiled_runner(
    config: ServerConfig, model: Decoder, placement: Placement, programs: Path | None
) -> tuple[Runner, dict[int, float], MemoryPlan | None]:
    """The runner with its programs, the seconds that each took, and how memory was divided to size it.

    `programs` is the folder that keeps them.
    """
    assert config.page_size is not None
    assert config.buckets is not None
    with jax.enable_x64(config.dtype == "float64"):
        sizes = RunnerConfig(
            num_pages=config.num_pages or NOMINAL_PAGES,
            page_size=config.page_size,
            buckets=config.buckets,
            num_slots=2 * max(config.buckets),
            backend=_attention(config, model),
            max_logit_bias=config.max_logit_bias,
            max_top_logprobs=config.max_top_logprobs,
            max_depth=config.max_depth,
            placement=placement,
        )
        memory, limit = None, device_limit(placement.devices)
        if config.num_pages is None and limit is not None:
            key = {"model": repr(model.config), "sizes": repr(sizes), "limit": limit, "jax": jax.__version__}
            memory = remembered(programs, key, lambda: Runner(model, sizes).memory(limit))
            sizes = replace(sizes, num_pages=memory.num_pages)
        runner = Runner(model, sizes)
        return runner, runner.compile(_Compiled(len(sizes.buckets))), memory


class _Compiled:
    """Says how many of the programs are compiled, as each of them is: that takes minutes."""

    def __init__(self, of: int) -> None:
        self._of, self._done = of, itertools.count(1)

    def __call__(self, rows: int, seconds: float) -> None:
        program = f"{next(self._done)} of {self._of}"
        log.info("compiled", program=program, rows=rows, seconds=round(seconds, 1))


def _check_names(config: ServerConfig, model: Decoder, placement: Placement) -> None:
    """Raises OptionError for what would be found wrong once the model is loaded."""
    backend, device = _attention(config, model), placement.devices[0].device_kind
    wanted = conditions(device, model.config, model.dtype.name, backend.name, placement)
    if (profile := _profile(config, wanted)) is not None:
        with naming("profile"):
            StepLatencyModel.from_profile(profile, config.buckets, config.predictor)


def _profile(config: ServerConfig, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The profile to start from, if there is one; `wanted` are the conditions of one that fits.

    Raises OptionError for one that cannot be used, and where one is needed.
    """
    if config.profile == "auto":
        profile = next(matching(wanted), None)
    else:
        with naming("profile"):
            profile = None if config.profile == "measure" else load_profile(config.profile)
    if profile is None and config.predictor != "staircase":
        why = f"--predictor {config.predictor} needs a --profile, and none fits this server"
        raise OptionError(why, "predictor", "profile")
    return profile


def predictor_for(config: ServerConfig, runner: Runner, device: str) -> tuple[StepLatencyModel, str]:
    """The step-time predictor, and where its figures are from. Warms every program up."""
    measured = runner.measure()
    if 1e3 * measured.rows_seconds(1) > config.tpot_slo_ms:  # or was the machine busy?
        measured = min(measured, runner.measure(), key=lambda each: each.rows_seconds(1))
    measured_on = runner.dtype.name, runner.config.backend.name, runner.config.placement
    profile = _profile(config, conditions(device, runner.model_config, *measured_on))
    if profile is None:
        return measured, "measured at start"
    model = StepLatencyModel.from_profile(profile, runner.buckets, config.predictor)
    if config.profile == "auto":
        off = {
            bucket: miss for bucket, miss in misses(model, measured, runner).items() if abs(miss) > MOST_OFF
        }
        if off:
            log.warning("the shipped profile does not fit this machine", profile=profile["name"], off=off)
            return measured, "measured at start"
    return model, f"profile {profile['name']}, {config.predictor}"


def _attention(config: ServerConfig, model: Decoder) -> Backend:
    with naming("attention"):
        named = None if config.attention == "auto" else backend_named(config.attention)
    backend = named or default_backend(model.config.head_dim, model.dtype)
    if config.deterministic:
        return backend.deterministic()
    return backend.fitted(model.config.head_dim, model.dtype, config.tensor_parallel)
