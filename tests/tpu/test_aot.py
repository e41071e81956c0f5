"""Programs for TPUs that are not here, as libtpu compiles them for real ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from bench.hlo import collectives
from bench.tpu.estimate import roofline_shares
from bench.tpu.kernels import Kernels, cycles, tpu_for
from bench.tpu.topology import TopologyError, devices
from bench.tpu_aot import main
from model.config import PRESETS
from model.decode import compile_ahead
from model.decoder import Decoder
from model.kv_cache import KVCache, bytes_per_page
from model.sampling import SlotState
from model.sharding import Placement
from model.step import StepLayout, StepProgram, compile_step
from model.weights import place_model

DTYPE = jnp.bfloat16
# So few pages that a layer's would fit into a core's fast memory.
LAYERS, ROWS, PAGES, PAGE_SIZE = 2, 64, 512, 64
QWEN3_32B = replace(PRESETS["qwen3-32b"], num_layers=LAYERS)


def step(topology: str, chips: int) -> StepProgram:
    """Of two layers of Qwen3-32B, which samples greedily."""
    devices_ = devices(topology, chips)
    placement, backend = Placement.over(QWEN3_32B, chips, devices_), tpu_for(devices_[0])
    structure, weights = place_model(Decoder(QWEN3_32B, DTYPE), placement).split()
    sizes: dict[str, Any] = {"num_pages": PAGES, "page_size": PAGE_SIZE, "placement": placement}
    return compile_step(
        structure,
        weights,
        KVCache.abstract(backend, QWEN3_32B, PAGES, PAGE_SIZE, DTYPE, placement),
        SlotState.abstract(2 * ROWS, QWEN3_32B.vocab_size, 64, placement),
        layout=StepLayout.for_bucket(QWEN3_32B, backend, ROWS, samples=ROWS, **sizes),
        max_top_logprobs=8,
        samplers=(0,),
    )


# What may give pages: the kernels, and what only names them.
IN_PLACE = {"parameter", "custom-call", "get-tuple-element", "tuple", "bitcast"}


@pytest.fixture(scope="module")
def over_eight() -> StepProgram:
    return step("v5e:2x4", 8)


def test_a_step_of_eight_chips_tells_two_sums_a_layer_and_little_else(over_eight: StepProgram) -> None:
    told = Counter(map(str, collectives(over_eight.forward.as_text())))
    assert told == {f"all-reduce bf16[{ROWS},5120]": 2 * LAYERS + 1}
    assert Counter(map(str, collectives(over_eight.samplers[0].as_text()))) == {"all-gather f32[8,2,64]": 1}


def test_pages_are_updated_in_place_and_never_copied(over_eight: StepProgram) -> None:
    """Nor brought into fast memory as a whole, in parts either: there XLA says S(1)."""
    layout = over_eight.layout
    cache = PAGES * bytes_per_page(layout.backend, QWEN3_32B, PAGE_SIZE, DTYPE, layout.placement)
    memory = over_eight.forward.memory_analysis()
    assert memory.alias_size_in_bytes == cache
    assert memory.temp_size_in_bytes < cache / LAYERS / 4
    text, page = over_eight.forward.as_text(), rf"1,2,{PAGE_SIZE},128\]"
    made_by = Counter(re.findall(rf" = (?:\([^=\n]*)?bf16\[{PAGES},{page}[^=\n]*? ([a-z][\w-]*)\(", text))
    assert made_by["parameter"] == LAYERS
    assert set(made_by) <= IN_PLACE, made_by
    assert not re.findall(rf"bf16\[\d+,{page}\{{[^}}]*S\(1\)", text)


@pytest.mark.parametrize(
    ("topology", "kv_heads", "shares"),
    [
        ("v5e:2x2", 1, {8: 0.9, 64: 0.9, 128: 0.9}),
        pytest.param("v5p:2x2x1", 2, {8: 0.9, 64: 0.9, 128: 0.75}, marks=pytest.mark.full),
        pytest.param("v6e:2x2", 1, {8: 0.75, 64: 0.75, 128: 0.6}, marks=pytest.mark.full),
    ],
)
def test_the_kernels_keep_to_their_cycles(topology: str, kv_heads: int, shares: dict[int, float]) -> None:
    """With the heads that eight chips have of Qwen3-32B, or four; by lanes, a share of the memory's rate."""
    kernels = Kernels(topology=topology, heads=8 * kv_heads, kv_heads=kv_heads)
    backend = tpu_for(devices(topology)[0])
    attend, write = cycles(kernels, backend)
    assert [*attend.updates] == [*attend.masked] == [8, 64, 128]
    assert attend.heads == kv_heads
    if topology == "v5e:2x2":
        assert attend.updates[8] <= 900
    planned = {lanes: pytest.approx(each, rel=0.1) for lanes, each in backend.chip.updates}
    assert {lanes: each / kv_heads for lanes, each in attend.updates.items()} == planned
    assert attend.page <= 8
    assert write.once <= 6000
    plan = backend.plan(kernels.rows, kernels.sizes, kernels.head_dim, DTYPE)
    page = kv_heads * 2 * 128 * PAGE_SIZE * 2
    reached = roofline_shares(attend, plan, page, backend.chip)
    assert all(reached[lanes] >= share for lanes, share in shares.items()), reached


@pytest.mark.parametrize(
    ("topology", "count", "why"),
    [("v5e:1x1", None, "knows no topology 'v5e:1x1'"), ("v5e:2x2", 5, "has 4 devices, not 5")],
)
def test_a_topology_that_there_is_not_is_refused(topology: str, count: int | None, why: str) -> None:
    with pytest.raises(TopologyError, match=why):
        devices(topology, count)


@pytest.mark.full
@pytest.mark.parametrize("chips", [1, 8])
def test_the_loop_of_taper_decode_compiles(chips: int) -> None:
    """For eight prompts, which are one pass of 256 rows, and 96 tokens of each of 64 branches."""
    chosen = devices("v5e:2x4", chips)
    placement, backend = Placement.over(QWEN3_32B, chips, chosen), tpu_for(chosen[0])
    model = place_model(Decoder(QWEN3_32B, DTYPE), placement)
    prompts: list[list[int]] = [[*range(1, 33)]] * 8
    program = compile_ahead(
        model, prompts, max_tokens=96, branches=8, page_size=16, backend=backend, placement=placement
    )
    pages = 256 // 16 + 8 + 64 * 96 // 16
    cache = pages * bytes_per_page(backend, QWEN3_32B, 16, DTYPE, placement)
    assert program.memory_analysis().alias_size_in_bytes >= cache
    # Of the last layer the pass needs keys and values only.
    expected = {
        "all-reduce bf16[256,5120]": 2 * LAYERS - 1,
        "all-reduce bf16[64,5120]": 2 * LAYERS + 1,
        "all-gather f32[8,2,64]": 1,
    }
    assert Counter(map(str, collectives(program.as_text()))) == (expected if chips > 1 else {})


def test_the_command_says_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--topology", "v5e:2x2", "--chips", "1", "--model", "qwen3-0.6b", "--layers", "1"]
    main([*one, "--rows", "8", "--kv-tokens", "16384", "--json", "-"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["topology"], result["chips"], result["fits"]) == ("v5e:2x2", 1, True)
    assert result["compile_seconds"] > 0
    assert result["temp_bytes_per_chip"] < 2**23
    assert result["hbm_bytes_per_chip"] == 16 * 2**30
    assert result["collectives"] == {}
    assert result["kernel_cycles"].keys() == {"shared_prefix_attention", "kv_write"}
    assert 1 < result["over_floor"] == result["estimate_seconds"] / result["floor_seconds"]
    assert result["estimate_seconds"] == pytest.approx(sum(result["parts"].values()))
    assert (
        result["alias_bytes_per_chip"] < result["argument_bytes_per_chip"] < result["needed_bytes_per_chip"]
    )
    assert "estimated, not measured" in printed.err


def test_a_model_that_does_not_fit_is_said_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--topology", "v5e:2x2", "--chips", "1", "--model", "qwen3-0.6b", "--layers", "4"]
    result = main([*one, "--rows", "8", "--kv-tokens", "1200000"])
    assert not result["fits"]
    assert "DOES NOT FIT: RESOURCE_EXHAUSTED" in capsys.readouterr().out
