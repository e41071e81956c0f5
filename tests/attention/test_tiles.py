from __future__ import annotations

from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.layout import Read
from attention.tiles import TileCapacity, TileList, Tiling, pack_sees, plan_tiles, unpack_sees
from tests.attention.forest import Forest, forests, mixed_reads, positions_seen

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
    )


def capacity_for(reads: list[Read], cut: Tiling, num_pages: int = NUM_PAGES) -> TileCapacity:
    longest = max(len(read.pages) for read in reads)
    return TileCapacity.for_bucket(sum(read.rows for read in reads), num_pages, cut, pages_per_read=longest)


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


def needed(reads: list[Read], order: np.ndarray) -> Counter[tuple[int, int, int]]:
    in_order = [(reads[index], row) for index in order.tolist() for row in range(reads[index].rows)]
    return Counter(
        (row, *position)
        for row, (read, inner) in enumerate(in_order)
        for position in positions_seen(read, inner)
    )


def check(reads: list[Read], order: np.ndarray, tiles: TileList, cut: Tiling) -> None:
    """The whole contract: what is read, by whom, and where it goes."""
    count = int(tiles.num_tiles)
    rows = tiles.tile_rows[:count]
    assert (rows[:, 1] >= 1).all()
    assert (rows[:, 1] <= cut.wide_rows).all()
    assert (tiles.tile_whole[:count, 1] + tiles.tile_masked[:count, 1] >= 1).all()

    seen = Counter()
    writers: dict[int, list[int]] = {}  # of each row: the slots it is written to, -1 if final
    for tile, (row, size) in enumerate(rows.tolist()):
        seen.update(pages_seen(tiles, tile, cut.page_size))
        slot = int(tiles.tile_slot[tile])
        for i in range(size):
            writers.setdefault(row + i, []).append(slot if slot < 0 else slot + i)
    assert seen == needed(reads, order)

    assert set(writers) == set(range(sum(read.rows for read in reads)))
    written = sorted(slot for slots in writers.values() for slot in slots if slot >= 0)
    assert written == list(range(len(written)))
    for row, (first, parts) in enumerate(tiles.row_parts.tolist()):
        assert first >= 0
        merged = tiles.part_slots[first : first + max(parts, 0)].tolist()
        assert sorted(writers.get(row, [])) == ([-1] if parts < 0 else sorted(merged))


@st.composite
def tilings(draw: st.DrawFn, page_sizes: tuple[int, ...] = (1, 2, 4)) -> Tiling:
    page_size = draw(st.sampled_from(page_sizes))
    return Tiling(
        page_size=page_size,
        kv_heads=draw(st.sampled_from([1, 2, 8])),
        narrow_rows=draw(st.integers(1, 4)),
        wide_rows=draw(st.sampled_from([4, 5, 8, 12, 64, 128])),
        block_pages=draw(st.sampled_from([1, 2, 4, 5])),
        workers=draw(st.sampled_from([1, 7, 64, 264])),
    )


@given(forests(), tilings(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_row_sees_every_position_that_it_must_once_and_no_other(
    forest: Forest, cut: Tiling, random
) -> None:
    cut = replace(cut, page_size=forest.page_size)
    order, tiles = plan_tiles(forest.reads, capacity_for(forest.reads, cut))
    check(forest.reads, order, tiles, cut)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("group", [1, 2, 5, 8])
@pytest.mark.parametrize("workers", [1, 264])
def test_a_step_of_everything_is_covered(page_size: int, group: int, workers: int) -> None:
    cut = tiling(group, page_size, workers=workers)
    reads = mixed_reads(page_size)
    order, tiles = plan_tiles(reads, capacity_for(reads, cut))
    check(reads, order, tiles, cut)


def test_packed_fields_come_back() -> None:
    fields = np.array([[1, 0, 1, -256], [128, 127, 128, 255], [64, 3, 8, -1], [5, 0, 128, 0]])
    words = pack_sees(*fields.T)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(np.stack(unpack_sees(words), 1), fields)
    np.testing.assert_array_equal(np.stack(unpack_sees(jnp.asarray(words)), 1), fields)
