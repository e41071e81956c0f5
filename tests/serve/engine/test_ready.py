"""The table that the operator sees before serving begins."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from attention.gpu import Gpu
from model.config import PRESETS
from model.peer_memory import PeerMemory
from model.sharding import Placement
from scheduler.predictor import StepLatencyModel
from serve.engine.ready import Ready
from serve.engine.runner import RunnerConfig
from tests.serve.engine.memory_plan import PLAN

READY = Ready(
    model=PRESETS["qwen3-32b"],
    dtype="bfloat16",
    device="NVIDIA H200",
    runner=RunnerConfig(num_pages=3968, page_size=64, buckets=(8, 64), num_slots=128, backend=Gpu()),
    memory=PLAN,
    latency=StepLatencyModel({8: 0.0164, 64: 0.019}),
    latency_source="profile h200-qwen3-32b, staircase",
    load_seconds=6.9,
    compile_seconds={64: 11.4, 8: 10.5},
    seconds=51.4,
)


def test_the_table_says_how_the_memory_is_divided_and_what_each_bucket_took() -> None:
    table = str(READY).splitlines()
    assert table[0] == "qwen3-32b, bfloat16, on NVIDIA H200, attention by gpu"
    assert "3968 pages of 64 tokens: 253952 tokens, 62.0 GiB" in table[2]
    assert "128.0 GiB less weights 61.0, slots 1.0, 2 steps of 64 rows 2.0, reserve 2.0" in table[3]
    assert [line.split() for line in table[-3:-1]] == [["8", "10.5", "16.40"], ["64", "11.4", "19.00"]]
    assert table[-5].split(maxsplit=1) == ["steps", "profile h200-qwen3-32b, staircase"]
    assert table[-1].endswith("ready after 51.4 s")


def test_a_given_number_of_pages_needs_no_reasons() -> None:
    assert "less weights" not in str(replace(READY, memory=None))


def test_devices_that_share_a_model_are_counted_and_their_parts_named() -> None:
    placement = Placement.over(PRESETS["qwen3-32b"], 2)
    table = str(replace(READY, runner=replace(READY.runner, placement=placement))).splitlines()
    assert table[0] == "qwen3-32b, bfloat16, on 2 x NVIDIA H200, attention by gpu"
    assert table[1].split(maxsplit=1) == [
        "devices",
        "heads and MLP in 2 parts, KV heads in 2; vocabulary divided",
    ]
    assert "253952 tokens, 31.0 GiB on each device" in table[3]
    assert "128.0 GiB of each device less weights" in table[4]


def test_devices_that_reach_each_others_memory_say_so() -> None:
    placement = Placement.over(PRESETS["qwen3-32b"], 2)
    reached = replace(placement, memory=PeerMemory(jnp.zeros(2), jnp.zeros(2)))
    table, other = (
        str(replace(READY, runner=replace(READY.runner, placement=each))) for each in (reached, placement)
    )
    assert "each other's memory" in table
    assert "each other's memory" not in other
