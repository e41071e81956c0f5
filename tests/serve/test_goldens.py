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

SAMPLE = ["llama-gqa3-tied", "qwen3-gqa8-tied-narrow-heads-f16", "qwen2-gqa2-tied", "qwen3-yarn"]


@pytest.mark.parametrize("name", sampled(CHECKPOINTS, SAMPLE))
def test_64_greedy_tokens_are_those_of_transformers(golden_folder: Callable[[str], Path], name: str) -> None:
    """All prompts of a checkpoint at once: where a context is stretched, from before its end to beyond it."""
    runner = compiled_runner(load_model(str(golden_folder(name)), jnp.float32), buckets=(8,))
    continuations = Golden.load(name).continuations(CHECKPOINTS[name])
    program = Plan(stages=(serial(GREEDY_TOKENS),))
    requests = [
        Request(id=f"golden-{len(prompt)}", prompt=tuple(prompt), program=program)
        for prompt, _ in continuations
    ]
    answers = run(runner, requests).answers()
    for request, (_, expected) in zip(requests, continuations, strict=True):
        assert list(answers[request.id].tokens[()]) == expected, request.id
