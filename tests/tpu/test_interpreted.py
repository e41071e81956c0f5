"""taper-serve and taper-decode as they start on a TPU host, with the kernels interpreted: same tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod

import jax
import jax.numpy as jnp
import pytest

from attention import Backend
from attention.tpu import Tpu
from attention.xla import Xla
from model.checkpoint import ModelSource
from model.decode import generate
from model.sharding import ON_ONE_DEVICE
from scheduler.program import Plan
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from serve.config import ServerConfig
from serve.engine import startup
from serve.engine.runner import Runner
from tests.compiling import compiled_quickly
from tests.serve.lab import Answer, run
from tests.serve.loads import parallel, serial

PATIENT = Slo(tpot=60.0, ttft=600.0)
PROMPT = tuple(b"What is 3 + 4, and what is 5 + 6?")
REQUESTS = [
    Request(
        id="kv",
        prompt=PROMPT,
        program=Plan(stages=(serial(2), parallel("kv", 3, 2), serial(2, (33,)))),
        slo=PATIENT,
    ),
    Request(
        id="reprefill",
        prompt=PROMPT + PROMPT[:7],
        program=Plan(stages=(parallel("reprefill", 2, 3), serial(2))),
        sampling=SamplingParams(temperature=0.8, top_k=20, seed=5),
        slo=PATIENT,
    ),
]
INTERPRETED = Tpu(interpret=True, block_tokens=128)


@pytest.fixture
def device_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend], None]:
    """Sets what `--attention auto` finds to be the device's."""

    def of_device(backend: Backend) -> None:
        for module in ("serve.engine.startup", "model.decode"):
            monkeypatch.setattr(f"{module}.default_backend", lambda *_: backend)

    return of_device


def served(backend: Backend) -> dict[str, Answer]:
    config = ServerConfig(
        dtype="float32", page_size=16, num_pages=32, buckets=(16,), profile="measure", compilation_cache=None
    )
    with compiled_quickly():
        started = startup.start(config)
    started.engine.stop(drain=False, timeout=10)
    assert started.runner.config.backend == backend
    assert backend.name in str(started.ready)
    return run(started.runner, REQUESTS, max_chunk=16).answers()


@pytest.mark.full
def test_a_server_answers_forks_and_joins_as_on_a_cpu(
    device_backend: Callable[[Backend], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt chunks, branches of two requests in one step, both joins, greedy and seeded."""
    monkeypatch.setattr(Runner, "measure", partialmethod(Runner.measure, repeats=1))
    answers = {}
    for backend in (INTERPRETED, Xla()):
        device_backend(backend)
        answers[backend] = served(backend)
    assert answers[INTERPRETED] == answers[Xla()]
    assert {name: len(each.tokens) for name, each in answers[Xla()].items()} == {"kv": 3, "reprefill": 3}


@pytest.mark.full
def test_offline_decoding_gives_the_tokens_of_a_cpu(device_backend: Callable[[Backend], None]) -> None:
    """A loop on the device, which fills the pages of two branches."""
    model = ModelSource.find("default", "auto").load(jnp.dtype("float32"), ON_ONE_DEVICE, seed=0)
    ids = []
    for backend in (INTERPRETED, Xla()):
        device_backend(backend)
        with compiled_quickly():
            ids.append(generate(model, [PROMPT[:14]], max_tokens=4, branches=2, page_size=16).ids)
        jax.clear_caches()
    assert ids[0] == ids[1]
