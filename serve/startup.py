"""From a config to a started engine: weights, programs, the measured staircase, the scheduler."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import structlog

from attention import default_backend
from model.checkpoint import load_model, model_folder
from model.tokenizer import Tokenizer
from scheduler.plan import StepResult
from scheduler.predictor import StepLoad
from scheduler.program import GRAMMARS
from scheduler.request import Slo
from scheduler.scheduler import Scheduler, SchedulerConfig
from scheduler.slack import ControllerConfig
from serve.config import ServerConfig
from serve.engine import Engine
from serve.requests import ServedModel
from serve.runner import Runner, RunnerConfig
from serve.server import Backend

log = structlog.get_logger("taper")


def load(config: ServerConfig, on_step: Callable[[StepResult], None]) -> Backend:
    """Load the model, compile every program, measure their times and start the engine.

    Raises what is wrong with the config or the model folder, before anything is served.
    """
    _keep_compiled_programs(config.compilation_cache)
    # A preset has no tokenizer of its own: the embedded one will do for random weights.
    tokenizer = Tokenizer.from_folder(model_folder(config.model) or cast(Path, model_folder("default")))
    with jax.enable_x64(config.dtype == "float64"):
        started = time.perf_counter()
        model = load_model(config.model, jnp.dtype(config.dtype), config.load_format, seed=config.seed)
        log.info("loaded", model=model.config.name, dtype=config.dtype, seconds=_since(started))
    slots = 2 * max(config.buckets)
    runner = Runner(
        model,
        RunnerConfig(
            num_pages=config.num_pages,
            page_size=config.page_size,
            buckets=config.buckets,
            num_slots=slots,
            backend=default_backend(model.config.head_dim, model.dtype)
            if config.attention == "auto"
            else config.attention,
            max_logit_bias=config.max_logit_bias,
            max_top_logprobs=config.max_top_logprobs,
        ),
    )
    started = time.perf_counter()
    seconds = runner.compile()
    log.info(
        "compiled", buckets={bucket: round(s, 1) for bucket, s in seconds.items()}, seconds=_since(started)
    )
    latency = runner.measure()
    milliseconds = {bucket: round(1e3 * latency.rows_seconds(bucket), 2) for bucket in runner.buckets}
    kv_token_ns = round(1e9 * latency.reading_seconds(StepLoad(1, private_kv=1)), 2)
    log.info("measured", step_ms=milliseconds, kv_token_ns=kv_token_ns)

    max_context = min(model.config.max_context, config.max_context or model.config.max_context)
    scheduler = Scheduler(
        SchedulerConfig(
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_slots=slots,
            max_context=max_context,
            max_queue=config.max_queue,
            max_chunk=config.max_chunk,
            controller=ControllerConfig(rho=config.rho, fill=config.fill),
            prefix_cache=config.prefix_cache,
            policy=config.policy,
        ),
        latency,
        tokenizer,
    )
    served = ServedModel(
        name=model.config.name,
        architecture=cast(Literal["qwen3", "llama"], "qwen3" if model.config.qk_norm else "llama"),
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        max_context=max_context,
        eos_ids=tokenizer.eos_ids or model.config.eos_ids,
        join=model.config.join,
        grammars=GRAMMARS,
        own_grammar=model.config.tag_grammar,
        max_branches=config.max_branches,
        max_depth=config.max_depth,
        max_logit_bias=config.max_logit_bias,
        max_top_logprobs=config.max_top_logprobs,
        default_max_tokens=config.default_max_tokens,
        default_slo=Slo(tpot=config.tpot_slo_ms / 1e3, ttft=config.ttft_slo_ms / 1e3),
    )
    gc.collect()
    gc.freeze()  # weights and programs live as long as the process: no collection need visit them
    engine = Engine(scheduler, runner, on_step=on_step)
    engine.start()
    return Backend(engine=engine, model=served, device=jax.devices()[0].device_kind)


def _keep_compiled_programs(folder: str | None) -> None:
    """Use JAX's persistent compilation cache, for programs of every size."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
