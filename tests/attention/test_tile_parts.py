"""Tiles are split into parts so that all workers have work, and no further."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from attention import tile_parts
from attention.gpu import H200
from attention.reads import Read, Reads
from attention.tile_parts import Parts
from attention.tile_planner import lay_out_tiles
from attention.tile_reads import Tiles
from attention.tiles import TileList, Tiling
from tests.attention.forest import Forest
from tests.attention.tile_lists import capacity_for, groups, plan, tiling

# groups, width, prefix, tail, query heads per KV head: the shapes that shared-prefix attention is measured at
MEASURED = [
    (1, 8, 4096, 256, 8),
    (1, 32, 4096, 256, 8),
    (4, 16, 4096, 256, 8),
    (16, 16, 4096, 512, 8),
    (32, 8, 4096, 256, 8),
    (64, 4, 2048, 128, 8),
    (32, 16, 4096, 64, 8),
    (1, 128, 8192, 256, 8),
    (32, 8, 4096, 256, 2),
    (1, 128, 8192, 256, 2),
    (64, 1, 0, 4096, 8),
    (40, 1, 0, 4096, 8),
]


def seconds(tiles: TileList, cut: Tiling) -> np.ndarray:
    """Predicted for every tile."""
    count = int(tiles.num_tiles)
    pages = np.stack([tiles.tile_whole[:count, 1], tiles.tile_masked[:count, 1]])
    blocks = (-(-pages // cut.block_pages)).sum(0)
    return H200.tile + blocks * cut.block_seconds(tiles.tile_rows[:count, 1])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("lanes", [64, 128])
@pytest.mark.parametrize(("count", "width", "prefix", "tail", "group"), MEASURED)
def test_the_load_is_even(
    count: int, width: int, prefix: int, tail: int, group: int, lanes: int, page_size: int
) -> None:
    """As the device runs them: in the list's order, each head of a tile by whichever worker is free."""
    cut = tiling(group, page_size, lanes=lanes)
    reads = groups(count, width, prefix, tail, page_size)
    _, tiles = lay_out_tiles(Reads.of(reads), capacity_for(reads, cut, num_pages=32768))
    costs = seconds(tiles, cut)
    assert (np.diff(costs) <= 0).all()
    busy_until = [0.0] * cut.workers
    for cost in costs.repeat(cut.kv_heads):
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    assert max(busy_until) < 1.3 * np.mean(busy_until)


def test_tiles_that_fill_the_device_evenly_are_not_split() -> None:
    reads = groups(32, 8, 4096, 256)
    _, tiles = lay_out_tiles(Reads.of(reads), capacity_for(reads, tiling()))
    assert tiles.num_tiles == 32
    assert (tiles.row_parts[:256, 1] == -1).all()


@pytest.mark.parametrize(("longest", "count"), [(5600, 33), (6400, 50)])
def test_tiles_of_a_nearly_even_load_are_not_split(longest: int, count: int) -> None:
    forest = Forest(page_size=64, stride=2053)
    forest.leaves = [((), forest.segment(length), 1) for length in (*[4096] * 32, longest)]
    assert plan(forest.reads, tiling()).num_tiles == count


@pytest.mark.parametrize(
    ("parts", "slots", "expected"),
    [
        ([4.0, 2.0], 0, (3.4, 3.0)),  # who is left at the end goes on at 0.4 of the time
        ([3.0, 4.0, 1.0, 2.0], 0, (5.0, 5.0)),  # the longest with the shortest
        ([4.0, 1.0, 1.0], 0, (3.4, 3.0)),
        ([4.0, 4.0], 6, (4.0 + 3 * H200.partial, 4.0 + 3 * H200.partial)),
    ],
)
def test_a_plan_takes_what_its_busiest_worker_takes(
    parts: list[float], slots: int, expected: tuple[float, float]
) -> None:
    none = np.zeros(len(parts), np.int64)
    partial = np.array([slots, *none[1:]])
    made = Parts(none, none, none, none, none, none, partial, seconds=np.array(parts))
    assert made.predict(tiling(group=1, kv_heads=1, workers=2)) == pytest.approx(expected, rel=1e-12)


def test_two_workers_share_one_long_tile() -> None:
    tiles = plan(groups(1, 1, 0, 4096), tiling(kv_heads=1, workers=2))
    assert tiles.tile_whole[:2].tolist() == [[0, 32], [32, 32]]


def test_no_coarser_split_is_planned_after_one_that_is_nearly_even_or_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[int] = []
    split = Parts.split

    def counted(tiles: Tiles, tile: np.ndarray, block: np.ndarray, cut: Tiling) -> Parts:
        planned.append(len(tile))
        return split(tiles, tile, block, cut)

    def lay_out(reads: list[Read]) -> None:
        lay_out_tiles(Reads.of(reads), capacity_for(reads, tiling()))

    monkeypatch.setattr(Parts, "split", counted)
    lay_out(groups(1, 32, 4096, 256))
    assert len(planned) == 1
    lay_out(groups(32, 8, 4096, 256))
    assert len(planned) == 1, "an even load is not planned at all"
    lay_out(groups(1, 8, 4096, 256))
    assert len(planned) == 3, "the coarser one was worse: no third one"


def test_who_sees_what_is_packed_anew_only_for_parts_that_begin_behind_their_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tile_parts, "unpack_sees", lambda _: pytest.fail("nothing begins later"))
    plan(groups(5, 1, 0, 1000), tiling(workers=1))
    assert plan(groups(1, 1, 0, 4096), tiling(kv_heads=1, workers=2)).num_tiles == 2


def test_a_short_end_of_a_tile_is_no_part_of_its_own() -> None:
    """Of 32 even cuts through 40 equal tiles, nine come within an eighth of a share of a tile's end."""
    assert plan(groups(40, 1, 0, 4096), tiling()).num_tiles == 40 + 32 - 9


def test_a_part_with_one_rows_tail_is_narrow() -> None:
    tiles = plan(groups(1, 8, prefix=64, tail=640), tiling(workers=8 * 33))
    count = int(tiles.num_tiles)
    assert (tiles.tile_part[:count] >= 0).all()
    assert 1 in tiles.tile_rows[:count, 1]
    assert (tiles.row_parts[:8, 1] >= 2).all()
