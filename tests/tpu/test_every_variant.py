"""Everything that the project compiles for TPUs: all variants of its kernels, and whole models."""

from __future__ import annotations

import pytest

from attention.tpu_chips import CHIPS
from bench.tpu.kernels import Kernels
from bench.tpu_aot import main

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# (page size, query heads of a KV head, head size, chip): those that are not marked as of the full matrix.
DAILY = {(16, 5, 64, "v5p"), (128, 1, 32, "v6e")}


def variants() -> list[object]:
    every = [
        (page, group, head_dim, chip)
        for page in (16, 32, 64, 128)
        for group in (1, 2, 5, 8)
        for head_dim in (32, 64, 128)
        for chip in TOPOLOGIES
    ]
    return [pytest.param(*each, marks=() if each in DAILY else pytest.mark.full) for each in every]


@pytest.mark.parametrize(("page", "group", "head_dim", "chip"), variants())
def test_every_variant_of_the_kernels_compiles(page: int, group: int, head_dim: int, chip: str) -> None:
    kernels = Kernels(
        topology=TOPOLOGIES[chip],
        page_size=page,
        heads=2 * group,
        kv_heads=2,
        head_dim=head_dim,
        num_pages=512,
    )
    memory = kernels.compile().memory_analysis()
    assert memory.alias_size_in_bytes > 0


# Most bytes of a chip: arguments, with 200,000 tokens in the pages, and what is temporary. Nearly all of that
# is tables of XLA's prefetches of weights, some 33 a layer, which take 16 KiB each.
@pytest.mark.full
@pytest.mark.parametrize(
    ("topology", "arguments", "temporary", "over_floor"),
    [
        ("v5e:2x4", 14.75e9, 75e6, 1.3),
        ("v6e:2x4", 14.75e9, 105e6, 1.45),  # a fifth of its step is all-reduces, mostly their hops
        ("v5p:2x2x1", 29.5e9, 40e6, 1.3),
    ],
)
def test_the_largest_model_fits(topology: str, arguments: float, temporary: float, over_floor: float) -> None:
    result = main(["--topology", topology])
    assert result["fits"]
    assert result["argument_bytes_per_chip"] < 1.02 * arguments
    assert result["temp_bytes_per_chip"] < temporary
    assert result["alias_bytes_per_chip"] == pytest.approx(200_000 * 64 * 512 * 8 / result["chips"], rel=0.01)
    assert result["collectives"]["all-reduce bf16[64,5120]"] == 129
    assert result["over_floor"] <= over_floor


@pytest.mark.full
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_a_small_model_fits_one_chip(chip: str) -> None:
    result = main(
        ["--topology", TOPOLOGIES[chip], "--chips", "1", "--model", "qwen3-0.6b", "--kv-tokens", "65536"]
    )
    assert result["fits"]
    assert result["collectives"] == {}
    assert result["device"] in CHIPS[chip].kinds
