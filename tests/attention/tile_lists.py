"""Tilings, groups of branches to plan, and the whole contract that a list of tiles must keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from attention.gpu import H200
from attention.reads import Read, Reads
from attention.tile_planner import lay_out_tiles
from attention.tiles import TileCapacity, TileList, Tiling, unpack_sees
from tests.attention.forest import groups_of_branches, pages_of, positions_seen

NUM_PAGES = 4096  # of a Forest


def tiling(
    group: int = 8, page_size: int = 64, *, kv_heads: int = 8, lanes: int = 64, workers: int = 264
) -> Tiling:
    """Tiles of 16 and `lanes` (row, query head) pairs, read in blocks of 64 positions."""
    return Tiling(
        page_size=page_size,
        kv_heads=kv_heads,
        narrow_rows=max(1, 16 // group),
        wide_rows=max(1, lanes // group),
        block_pages=max(1, 64 // page_size),
        workers=workers,
        costs=H200,
    )


def with_tall(cut: Tiling, workers: int = 132) -> Tiling:
    """The same with tall tiles of twice a wide one's rows, for so many workers."""
    return replace(cut, tall_rows=2 * cut.wide_rows, tall_workers=workers)


def capacity_for(reads: list[Read], cut: Tiling, num_pages: int = NUM_PAGES) -> TileCapacity:
    longest = max(len(pages_of(read)) for read in reads)
    return TileCapacity.for_bucket(sum(read.rows for read in reads), num_pages, cut, pages_per_read=longest)


def groups(count: int, width: int, prefix: int, tail: int, page_size: int = 64) -> list[Read]:
    """Groups of branches that decode: each at the end of a tail of its own, after its group's prefix."""
    return groups_of_branches(count, width, prefix, [tail], page_size)


def references(tiles: TileList) -> int:
    """How many page references the list has."""
    return max(int(ranges.sum(1).max()) for ranges in (tiles.tile_whole, tiles.tile_masked))


def pages_seen(tiles: TileList, tile: int, page_size: int) -> list[tuple[int, int, int]]:
    """(row, page, offset) of everything that a tile computes."""
    (row, rows), (whole, wholes), (masked, maskeds) = (
        array[tile].tolist() for array in (tiles.tile_rows, tiles.tile_whole, tiles.tile_masked)
    )
    ids = tiles.page_ids.tolist()
    seen = [
        (row + i, page, offset)
        for page in ids[whole : whole + wholes]
        for i in range(rows)
        for offset in range(page_size)
    ]
    for ref in range(masked, masked + maskeds):
        valid, first, end, causal = (int(field) for field in unpack_sees(tiles.page_sees[ref]))
        assert 1 <= valid <= page_size
        assert 0 <= first < end <= rows
        seen += [
            (row + i, ids[ref], offset)
            for offset in range(valid)
            for i in range(max(first, offset - causal) if causal < 255 else first, end)
        ]
    return seen


def needed(reads: list[Read], order: np.ndarray, page_size: int) -> Counter[tuple[int, int, int]]:
    in_order = [(reads[index], row) for index in order.tolist() for row in range(reads[index].rows)]
    return Counter(
        (row, *position)
        for row, (read, inner) in enumerate(in_order)
        for position in positions_seen(read, inner, page_size)
    )


def check(reads: list[Read], order: np.ndarray, tiles: TileList, cut: Tiling) -> None:
    """The whole contract: what is read, by whom, and where it goes."""
    count = int(tiles.num_tiles)
    rows = tiles.tile_rows[:count]
    assert (rows[:, 1] >= 1).all()
    assert (rows[:, 1] <= cut.most_rows).all()
    tall = rows[:, 1] > cut.wide_rows
    assert tall[: tall.sum()].all(), "tall tiles come first"
    assert (tiles.tile_whole[:count, 1] + tiles.tile_masked[:count, 1] >= 1).all()

    seen = Counter()
    writers: dict[int, list[int]] = {}  # of each row: the slots it is written to, -1 if final
    for tile, (row, size) in enumerate(rows.tolist()):
        seen.update(pages_seen(tiles, tile, cut.page_size))
        part = int(tiles.tile_part[tile])
        for i in range(size):
            slot = -1 if part < 0 else int(tiles.part_slots[part + i])
            writers.setdefault(row + i, []).append(slot)
    assert seen == needed(reads, order, cut.page_size)

    assert set(writers) == set(range(sum(read.rows for read in reads)))
    written = sorted(slot for slots in writers.values() for slot in slots if slot >= 0)
    assert written == list(range(len(written)))
    for row, (first, parts) in enumerate(tiles.row_parts.tolist()):
        merged = [-1] if parts < 0 else list(range(first, first + parts))
        assert sorted(writers.get(row, [])) == merged


def plan(reads: list[Read], cut: Tiling) -> TileList:
    order, tiles = lay_out_tiles(Reads.of(reads), capacity_for(reads, cut))
    check(reads, order, tiles, cut)
    return tiles
