"""Every option of taper-serve arrives where it is used."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import structlog

from model.checkpoint import load_model
from model.config import PRESETS
from model.sharding import ON_ONE_DEVICE, Placement
from model.tokenizer import Tokenizer
from scheduler.request import Slo
from serve.config import OptionError, ServerConfig
from serve.door import StepRecord, Watcher
from serve.engine import startup
from serve.engine.collector import NEVER
from serve.engine.memory import MemoryPlan
from serve.engine.runner import RunnerConfig
from serve.engine.startup import Started
from serve.served import Platform, Served, ServedModel
from tests.serve.engine.memory_plan import PLAN

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Of each option: a value other than the default, and what of a started engine shows that it arrived.
ENGINE: dict[str, tuple[Any, Callable[[Started], Any]]] = {
    "dtype": ("bfloat16", lambda s: s.runner.dtype.name),
    "attention": ("reference", lambda s: s.ready.runner.backend.name),
    "tensor_parallel": (2, lambda s: s.runner.config.placement.count),
    "page_size": (8, lambda s: s.engine.scheduler.config.page_size),
    "num_pages": (96, lambda s: s.engine.scheduler.config.num_pages),
    "buckets": ((2, 4), lambda s: tuple(s.engine.scheduler.controller.latency.buckets)),
    "prefix_cache": (False, lambda s: s.engine.scheduler.config.prefix_cache),
    "max_context": (90, lambda s: s.engine.scheduler.config.max_context),
    "max_queue": (7, lambda s: s.engine.scheduler.config.max_queue),
    "reserve": (0.25, lambda s: s.engine.scheduler.config.reserve),
    "policy": ("cap:3", lambda s: s.engine.policy),
    "rho": (0.5, lambda s: s.engine.scheduler.controller.config.rho),
    "repay": (3.0, lambda s: s.engine.scheduler.controller.config.repay),
    "fill": (False, lambda s: s.engine.scheduler.controller.config.fill),
    "max_chunk": (3, lambda s: s.engine.scheduler.controller.config.max_chunk),
    "tag_set": ("npr", lambda s: s.model.own_grammar),
    "max_branches": (5, lambda s: s.model.max_branches),
    "max_depth": (2, lambda s: s.model.max_depth),
    "max_logit_bias": (3, lambda s: s.model.max_logit_bias),
    "max_top_logprobs": (2, lambda s: s.model.max_top_logprobs),
    "default_max_tokens": (11, lambda s: s.model.default_max_tokens),
    "tpot_slo_ms": (70.0, lambda s: 1e3 * s.model.default_slo.tpot),
    "min_tpot_slo_ms": (66.0, lambda s: 1e3 * s.model.min_tpot),
    "reject_late": (True, lambda s: s.model.default_slo.reject),
    "max_client_queue": (6, lambda s: s.engine.scheduler.config.max_client_queue),
    "max_client_kv": (0.75, lambda s: s.engine.scheduler.config.max_client_kv),
    "max_client_running": (5, lambda s: s.engine.scheduler.config.max_client_running),
    "ttft_slo_ms": (900.0, lambda s: 1e3 * s.model.default_slo.ttft),
    "profile": ("measure", lambda s: s.ready.latency_source.split()[0].removesuffix("d")),
}
# Those that need more than a look: the tests below, and those named.
SHOWN_BELOW = {"model", "load_format", "seed", "compilation_cache", "step_log"}
SHOWN_ELSEWHERE = {
    "predictor": "test_calibration",
    "deterministic": "test_a_form_that_the_backend_lacks_is_refused",
    "host": "test_a_server_that_listens_everywhere_calls_itself_by_its_machines_name",
    "port": "test_server_life",
    "tokens": "test_callers",
    "tls_cert_path": "test_tls",
    "tls_key_path": "test_tls",
    "tls_client_ca_cert_path": "test_tls",
    "metrics_host": "test_tls",
    "share_prefix_cache": "test_callers",
    "control_host": "test_callers",
    "control_port": "test_callers",
    "gateway_host": "test_servicer",
    "gateway_port": "test_servicer",
    "metrics_port": "test_process",
    "vllm_metric_names": "test_metrics",
    "log_format": "test_logs",
    "log_level": "test_logs",
    "drain_timeout": "test_process",
    "step_timeout": "test_processes",
    "max_calls": "test_calls",
    "max_client_calls": "test_calls",
    "max_message_bytes": "test_calls",
    "readers": "test_hostile",
    "read_timeout": "test_hostile",
    "read_memory_mb": "test_hostile",
    "explain": "test_end_to_end",
    "engine_in_process": "test_commands",
    "peer_memory": "test_two_gpus_reach_each_others_memory_unless_they_are_told_not_to",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("started")


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[Started]:
    chosen = {name: value for name, (value, _) in ENGINE.items()}
    config = ServerConfig(
        model="default",
        load_format="random",
        seed=5,
        compilation_cache=str(folder / "programs"),
        step_log=str(folder / "steps.jsonl"),
        **chosen,
    )
    before = jax.config.jax_compilation_cache_dir
    made = startup.start(config)
    yield made
    made.engine.stop(drain=False, timeout=10.0)
    jax.config.update("jax_compilation_cache_dir", before)


def test_every_option_is_in_a_table() -> None:
    known = ENGINE.keys() | SHOWN_BELOW | SHOWN_ELSEWHERE.keys()
    assert known == {field.name for field in fields(ServerConfig)}
    defaults = ServerConfig().for_platform("cpu")
    assert [name for name, (value, _) in ENGINE.items() if value == getattr(defaults, name)] == []


@pytest.mark.parametrize("option", ENGINE)
def test_an_option_arrives(started: Started, option: str) -> None:
    value, seen = ENGINE[option]
    assert seen(started) == (pytest.approx(value) if isinstance(value, float) else value)


def test_the_limits_of_a_request_are_those_of_the_device(started: Started) -> None:
    assert started.runner.config.max_logit_bias == started.model.max_logit_bias
    assert started.runner.config.max_top_logprobs == started.model.max_top_logprobs
    assert started.runner.config.num_slots == started.engine.scheduler.config.num_slots == 8
    assert started.model.max_context == started.engine.scheduler.config.max_context
    assert started.model.name == "taper-tiny"
    assert started.model.default_slo == Slo(tpot=0.07, ttft=0.9, reject=True)


@pytest.mark.parametrize(
    ("step_ms", "least_ms"),
    [(20.0, 30.0), (40.0, 50.0), (60.0, 60.0)],
    ids=["half as much again", "no more than the default", "what can be kept"],
)
def test_the_least_target_that_may_be_asked_for_follows_from_the_step_of_one_row(
    step_ms: float, least_ms: float
) -> None:
    tokenizer = Tokenizer.without_tokens((7,), "none")
    model = ServedModel.of(ServerConfig(tpot_slo_ms=50.0), PRESETS["qwen3-8b"], tokenizer, step_ms / 1e3)
    assert 1e3 * model.min_tpot == pytest.approx(least_ms)
    assert model.default_slo.tpot == 0.05, "it is not held to its own floor"


def test_what_is_served_is_what_was_started(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[ServerConfig, Watcher | None]] = []

    def start(config: ServerConfig, *, watch: Watcher | None = None) -> Started:
        asked.append((config, watch))
        return started

    monkeypatch.setattr(startup, "start", start)
    config, records = ServerConfig(port=0), list[StepRecord]()
    switch = sys.getswitchinterval()
    try:
        served = startup.load(config, records.append)
        assert sys.getswitchinterval() < 0.001, "the engine's thread does not wait long for the interpreter"
    finally:
        sys.setswitchinterval(switch)
    assert asked == [(config, records.append)]
    assert served == Served(engine=started.engine, model=started.model, platform=started.platform)
    assert started.platform == Platform(
        device=jax.devices()[0].device_kind,
        devices=2,
        largest_bucket=4,
        page_size=started.runner.config.page_size,
        unloaded_step=started.ready.latency.rows_seconds(1),
        summary=str(started.ready),
    )


def test_the_programs_that_it_got_while_it_started_are_in_its_load(started: Started) -> None:
    compiled, cached, *_ = started.engine.load().programs
    assert compiled + cached >= len([*started.runner.buckets])


@pytest.mark.parametrize("told", [{}, {"peer_memory": False}])
def test_two_gpus_reach_each_others_memory_unless_they_are_told_not_to(
    told: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        """Where they are asked whether they can."""

    def between(mesh: object) -> None:
        raise ReachedError

    def loading(**_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("model.sharding.PeerMemory.between", between)
    monkeypatch.setattr(startup, "ThreadPoolExecutor", loading)  # what comes after the placement
    with pytest.raises(TimeoutError if told else ReachedError):
        startup.start(
            ServerConfig(
                model="qwen3-0.6b",
                load_format="random",
                tensor_parallel=2,
                compilation_cache=None,
                **told,
            )
        )


def test_garbage_is_collected_when_nothing_runs(started: Started) -> None:
    assert gc.get_threshold()[2] == NEVER


def test_what_clients_may_ask_for_is_what_the_model_can() -> None:
    model, tokenizer = PRESETS["qwen3-8b"], Tokenizer.without_tokens((7,), "none")
    longest = {
        asked: ServedModel.of(ServerConfig(max_context=asked), model, tokenizer).max_context
        for asked in (None, 90, 2 * model.max_context)
    }
    assert longest == {None: model.max_context, 90: 90, 2 * model.max_context: model.max_context}
    assert ServedModel.of(ServerConfig(), model, tokenizer).eos_ids == (7,)
    silent = replace(tokenizer, eos_ids=())
    assert ServedModel.of(ServerConfig(), model, silent).eos_ids == model.eos_ids != ()


class Sized:
    """Stands in for a Runner."""

    def __init__(self, _: object, config: RunnerConfig) -> None:
        self.config = config

    def memory(self, limit: int) -> MemoryPlan:
        return replace(PLAN, limit=limit)

    def compile(self, *_: object) -> dict[int, float]:
        return {}


def test_the_pool_is_what_the_memory_leaves_unless_its_pages_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(startup, "Runner", Sized)
    monkeypatch.setattr(startup, "device_limit", lambda _: PLAN.limit)
    model: Any = SimpleNamespace(config=PRESETS["qwen3-8b"], dtype=jnp.float32)
    for asked, pages, plan in ((None, PLAN.num_pages, PLAN), (96, 96, None)):
        config = ServerConfig(num_pages=asked, compilation_cache=None, attention="reference")
        runner, _, memory = startup._compiled_runner(config.for_platform("cpu"), model, ON_ONE_DEVICE, None)
        assert (runner.config.num_pages, memory) == (pages, plan)


def test_the_pool_is_sized_by_the_devices_that_share_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was remembered for other numbers of them is no answer."""
    limits = {1: 128 * 2**30, 2: 128 * 2**30, 4: 96 * 2**30}
    asked: list[list[Any]] = []

    def limit(devices: list[Any]) -> int:
        asked.append(devices)
        return limits[len(devices)]

    monkeypatch.setattr(startup, "Runner", Sized)
    monkeypatch.setattr(startup, "device_limit", limit)
    model: Any = SimpleNamespace(config=PRESETS["qwen3-8b"], dtype=jnp.float32)
    config = ServerConfig(attention="reference").for_platform("cpu")
    for count in limits:
        startup._compiled_runner(config, model, Placement.over(model.config, count), tmp_path)
    assert asked == [jax.devices()[:count] for count in limits]
    assert len([*tmp_path.glob("memory-*.json")]) == len(limits)


def test_jax_is_prepared_for_the_devices_before_it_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        pass

    def ask(count: int) -> None:
        raise AskedError(count)

    def look() -> str:
        raise AssertionError("JAX has found its devices")

    monkeypatch.setattr(startup, "ask_for_devices", ask)
    monkeypatch.setattr(jax, "default_backend", look)
    with pytest.raises(AskedError, match="3"):
        startup.start(ServerConfig(tensor_parallel=3))


def test_the_operator_hears_what_is_odd_about_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "model_tokenizer", lambda _: (SimpleNamespace(notes=("one",)), None))
    monkeypatch.setattr(startup.ModelSource, "find", lambda *_: SimpleNamespace(notes=("two", "three")))
    with structlog.testing.capture_logs() as heard:
        startup._find(ServerConfig(model="odd"))
    assert [(each["event"], each["model"]) for each in heard] == [
        (note, "odd") for note in ("one", "two", "three")
    ]


def test_weights_are_random_by_their_seed(started: Started) -> None:
    _, wanted = load_model("default", jnp.bfloat16, "random", seed=5).split()
    _, others = load_model("default", jnp.bfloat16, "random", seed=6).split()
    np.testing.assert_array_equal(started.runner.weights[0], wanted[0])
    assert (np.asarray(wanted[0]) != np.asarray(others[0])).any()


def test_programs_and_steps_are_written_where_they_should_be(started: Started, folder: Path) -> None:
    assert jax.config.jax_compilation_cache_dir == str(folder / "programs")
    assert (folder / "steps.jsonl").exists()


def test_chunks_are_as_large_as_the_largest_bucket_unless_they_are_chosen() -> None:
    assert startup.controller_config(ServerConfig(), largest_bucket=64).max_chunk == 64
    assert startup.controller_config(ServerConfig(max_chunk=3), largest_bucket=64).max_chunk == 3


@pytest.mark.parametrize("attention", ["auto", "tpu-v5e"])
def test_a_form_that_the_backend_lacks_is_refused(attention: str) -> None:
    with pytest.raises(ValueError, match="no deterministic form"):
        startup.start(ServerConfig(attention=attention, deterministic=True, compilation_cache=None))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model": "nowhere"}, "--model: no model 'nowhere'"),
        ({"model": "qwen3-8b"}, "--model: the preset qwen3-8b comes without weights"),
        ({"attention": "nobody"}, "--attention: no attention backend 'nobody'"),
        ({"tensor_parallel": 99}, "--tensor-parallel: cannot divide a model over 99 devices"),
        ({"tensor_parallel": 3}, "--tensor-parallel: cannot divide taper-tiny over 3 devices"),
        ({"profile": "nowhere"}, "--profile: there is no profile 'nowhere'"),
        ({"profile": "FOLDER/text.json"}, "--profile: FOLDER/text.json is not JSON"),
        ({"profile": "FOLDER/other.json"}, "--profile: FOLDER/other.json is no profile"),
        ({"profile": "cpu-taper-tiny", "buckets": (4096,)}, "--profile: 4096 rows do not fit"),
        ({"predictor": "linear"}, "--predictor linear needs a --profile, and none fits this server"),
        ({"step_log": "FOLDER/missing/steps"}, "--step-log: FOLDER/missing/steps: No such file"),
        ({"step_log": "FOLDER", "model": "nowhere"}, "--step-log: FOLDER: Is a directory"),
    ],
)
def test_what_an_option_names_is_looked_for_before_anything_is_loaded(
    options: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("it is being loaded")

    monkeypatch.setattr(startup.ModelSource, "load", load)
    (tmp_path / "text.json").write_text("a profile")
    (tmp_path / "other.json").write_text('{"name": "other"}')
    given = {
        option: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value
        for option, value in options.items()
    }
    with pytest.raises(OptionError) as caught:
        startup.start(ServerConfig(**given, compilation_cache=None))
    assert str(caught.value).startswith(line.replace("FOLDER", str(tmp_path)))
