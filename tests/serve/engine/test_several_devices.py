"""An engine whose model lies on several devices serves what it would serve on one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest

from scheduler.request import Request, Slo
from serve.engine.runner import Runner
from tests.compiling import compiled_quickly
from tests.model.meshes import divisible, meshes, over
from tests.serve.lab import Run, compiled_runner, run, samples
from tests.serve.loads import SMALL_POOL, load

PATIENT = Slo(tpot=10.0, ttft=60.0)


def requests() -> list[Request]:
    """Every kind of plan, join and sampling; half of them want log-probabilities."""
    return [
        replace(request, sampling=replace(request.sampling, logprobs=True, top_logprobs=3))
        if index % 2 == 0
        else request
        for index, request in enumerate(load(PATIENT))
    ]


@lru_cache(maxsize=2)
def runner(kv_heads: int, count: int) -> Runner:
    placement, model = over(divisible(kv_heads), count)
    return compiled_runner(model, (32,), placement=placement)


def served(kv_heads: int, count: int, **settings: Any) -> Run:
    return run(runner(kv_heads, count), requests(), **settings)


@pytest.mark.full
def test_the_memory_plan_is_that_of_each_device() -> None:
    shared = runner(2, 4)
    with compiled_quickly():
        plan = shared.memory(2**30)
    assert plan.weights == on_the_first(shared.weights)
    assert plan.slots == on_the_first(shared.slots)
    assert shared.config.num_pages * plan.page == on_the_first(shared.cache)


def on_the_first(tree: Any) -> int:
    """Bytes of arrays on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("kv_heads", "count"), meshes((2, 4)))
def test_every_plan_and_sampling_is_answered_as_by_one_device(kv_heads: int, count: int) -> None:
    """Forks, both joins, preemption; the schedules differ, too."""
    one = served(kv_heads, 1, policy="off")
    shared = served(kv_heads, count, policy="eager", num_pages=SMALL_POOL, max_chunk=3)
    assert shared.preemptions() > 0
    assert shared.answers() == one.answers()
    for name, events in one.events.items():
        got = samples(shared.events[name])
        for branch, expected in samples(events).items():
            for want, have in zip(expected, got[branch], strict=True):
                assert [token for token, _ in have.top] == [token for token, _ in want.top]
                numbers = [(each.logprob or 0.0, *dict(each.top).values()) for each in (want, have)]
                np.testing.assert_allclose(*numbers, rtol=1e-5)
