"""Greedy answers through the engine are those of `transformers` (recorded: tests/model/goldens)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from model.checkpoint import load_model
from scheduler.program import Plan
from scheduler.request import Request
from tests.model.checkpoints import CHECKPOINTS, GREEDY_TOKENS, Golden
from tests.serve.lab import compiled_runner, run
from tests.serve.loads import serial
from tests.sizes import sampled


@pytest.mark.parametrize(
    "name", sampled(CHECKPOINTS, ["llama-gqa3-tied", "qwen3-gqa8-tied-narrow-heads-f16"])
)
def test_64_greedy_tokens_are_those_of_transformers(golden_folder: Callable[[str], Path], name: str) -> None:
    runner = compiled_runner(load_model(str(golden_folder(name)), jnp.float32), buckets=(8,))
    prompt = tuple(CHECKPOINTS[name].prompt)
    request = Request(id="golden", prompt=prompt, program=Plan(stages=(serial(GREEDY_TOKENS),)))
    tokens = run(runner, [request]).answers()["golden"].tokens[()]
    assert list(tokens) == Golden.load(name).greedy.tolist()
