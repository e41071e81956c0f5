"""The engine serves the embedded model through the interpreted TPU kernels, and nobody can tell."""

from __future__ import annotations

import jax.numpy as jnp

from attention import Backend
from attention.tpu import Tpu
from attention.xla import Xla
from model.checkpoint import ModelSource
from model.sharding import ON_ONE_DEVICE
from scheduler.program import Plan
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from tests.compiling import compiled_quickly
from tests.serve.lab import Answer, compiled_runner, run
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


def answers(backend: Backend) -> dict[str, Answer]:
    model = ModelSource.find("default", "auto").load(jnp.dtype("float32"), ON_ONE_DEVICE, seed=0)
    runner = compiled_runner(model, (16,), backend, num_pages=48, page_size=16)
    return run(runner, REQUESTS, max_chunk=16).answers()


def test_forks_and_joins_are_answered_as_on_a_cpu() -> None:
    """Prompt chunks, branches of two requests in one step, both joins, greedy and seeded."""
    with compiled_quickly():
        interpreted = answers(Tpu(interpret=True, block_tokens=128))
    assert interpreted == answers(Xla())
    assert {name: len(answer.tokens) for name, answer in interpreted.items()} == {"kv": 3, "reprefill": 3}
