from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attention import Reads, Sizes
from attention.tpu import Tpu
from attention.tpu_chips import CHIPS, Chip
from attention.tpu_plan import Plan
from bench.device.shapes import PageTables, Shape
from bench.hlo import Collective
from bench.tpu.cycles import AttentionCycles
from bench.tpu.estimate import (
    HOP,
    Reading,
    collective_seconds,
    products_seconds,
    roofline_shares,
    sides_of,
    tile_cycles,
    update_cycles,
)
from bench.tpu.figures import FIGURES, figures_of

V5E, V5P = CHIPS["v5e"], CHIPS["v5p"]
CYCLES = AttentionCycles(
    heads=1,
    updates={8: 800, 64: 1000, 128: 1700},
    masked={8: 810, 64: 1100, 128: 1750},
    page=5,
    mask=400,
    block=200,
    tile=300,
    once=500,
)
PLAN = Plan(
    rows=64, kv_heads=1, group=8, head_dim=128, page_size=64, block_pages=32, lanes=512, cores=1, itemsize=2
)


def test_few_rows_wait_for_bytes_and_many_for_products() -> None:
    assert products_seconds(819e9, 64, V5E, FIGURES["v5e"]) == pytest.approx(1)
    assert products_seconds(197e12 / 1024, 1024, V5E, FIGURES["v5e"]) == pytest.approx(1)


def test_an_all_reduce_goes_round_a_ring_both_ways_and_along_the_sides_and_back() -> None:
    told = Collective("all-reduce", (("bf16", (64, 5120)),))
    figures = FIGURES["v5e"]
    assert figures.link == 50e9
    seconds = collective_seconds(told, (2, 4, 1), figures)
    assert seconds == pytest.approx(2 * 7 / 8 * 2 * 64 * 5120 / 100e9 + 2 * (1 + 3) * HOP)
    assert collective_seconds(told, (2, 1), figures) == pytest.approx(2 * 64 * 5120 / 50e9 + 2 * HOP)
    assert collective_seconds(told, (1, 1), figures) == 0


def test_an_all_gather_goes_once() -> None:
    told = Collective("all-gather", (("f32", (8, 2, 64)),))
    seconds = collective_seconds(told, (2, 4), FIGURES["v5e"])
    assert seconds == pytest.approx(7 / 8 * 4096 / 100e9 + 4 * HOP)


@pytest.mark.parametrize(
    ("lanes", "cycles"), [(1, 800), (8, 800), (9, 1000), (128, 1700), (129, 3400), (512, 6800)]
)
def test_an_update_is_by_the_smallest_code_with_room(lanes: int, cycles: int) -> None:
    assert update_cycles(CYCLES.updates, lanes) == cycles


def test_a_tile_is_its_blocks_of_which_those_that_are_not_full_are_masked() -> None:
    def cycles(*words: int) -> float:
        return tile_cycles(np.array(words), PLAN, CYCLES)

    assert cycles(0, 1, 0, 32, 0, 0) == 300 + 32 * 5 + 200 + 800
    assert cycles(0, 1, 0, 33, 0, 0) == 300 + 33 * 5 + 2 * 200 + 800 + 400 + 810
    assert cycles(8, 8, 0, 32, 0, 33) == 300 + 65 * 5 + 3 * 200 + 1000 + 2 * (400 + 1100)


def test_heads_that_are_updated_together_take_as_many_cycles_together() -> None:
    both = replace(CYCLES, heads=2)
    plan = replace(PLAN, kv_heads=8)
    assert tile_cycles(np.array([0, 1, 0, 32, 0, 0]), plan, both) == 300 + 32 * 5 + 200 + 4 * 800


@pytest.mark.parametrize("chip", [V5E, V5P])
def test_what_attention_reads_is_what_the_plan_copies(chip: Chip) -> None:
    """Each prefix once, each tail once; of two cores each has half of it."""
    backend, shape = Tpu(chip), Shape("decode", 8, 8, 2048, 192, 64, 8, 1)
    sizes = Sizes(num_pages=3125, page_size=64, heads=8, kv_heads=1)
    _, tiles = backend.lay_out(Reads.of(PageTables.of(shape, 0).reads()), backend.capacity(64, sizes))
    plan = backend.plan(64, sizes, 128, np.float32)
    reading = Reading.of(tiles, plan, CYCLES)
    assert reading.pages == shape.pages == 8 * 32 + 64 * 3
    each = tile_cycles(np.array([0, 8, 0, 32, 0, 24]), plan, CYCLES)
    assert reading.cycles == 500 + each * 8 / chip.cores
    page = 2 * 64 * 128 * 2
    assert reading.seconds(page, chip) == max(reading.cycles / chip.clock, reading.pages * page / chip.hbm)


def test_more_lanes_reach_less_of_the_memory_s_rate() -> None:
    """Blocks of 32 pages of 32 KiB, which take v5e 1.28 us to read."""
    shares = roofline_shares(CYCLES, PLAN, 32 * 1024, V5E)
    reading = 32 * 32 * 1024 / 819e9
    assert shares == {8: 1.0, 64: 1.0, 128: pytest.approx(reading / ((32 * 5 + 200 + 1700) / 1.5e9))}
    assert shares[128] < 1
    each_core_has_half = roofline_shares(CYCLES, PLAN, 32 * 1024, V5P)
    reading = 32 * 32 * 1024 / (2.765e12 / 2)
    assert each_core_has_half[128] == pytest.approx(reading / ((32 * 5 + 200 + 1700) / 1.75e9))


def test_a_tile_that_begins_between_two_windows_takes_the_lanes_before_it_too() -> None:
    """Twelve rows of five heads are 60 lanes: from row 1 on, which is lane 5 of its window, 65."""
    plan = replace(PLAN, group=5)
    at_a_window, between = (tile_cycles(np.array((row, 12, 0, 32, 0, 0)), plan, CYCLES) for row in (0, 1))
    assert between - at_a_window == 1700 - 1000


def test_the_sides_of_a_grid_are_those_of_its_places() -> None:
    assert sides_of([(x, y, 0) for x in range(2) for y in range(4)]) == [2, 4, 1]


def test_every_figure_has_its_source() -> None:
    for name, figures in FIGURES.items():
        assert figures.source.startswith("https://cloud.google.com/tpu/docs/")
        assert figures_of(CHIPS[name]) is figures
        assert figures.usable / figures.hbm == pytest.approx(1, abs=0.025)
    with pytest.raises(ValueError, match=r"no published figures of v4 are known here"):
        figures_of(CHIPS["v4"])
