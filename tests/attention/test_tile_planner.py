"""A plan covers what every row must see, once, and fits its capacity or says what does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.gpu import H200
from attention.reads import PageRun, Read, Reads
from attention.tile_planner import lay_out_tiles
from attention.tiles import TileCapacity, Tiling
from tests.attention.forest import Forest, forests, mixed_reads, pages_of
from tests.attention.tile_lists import capacity_for, check, groups, plan, references, tiling, with_tall


@given(st.one_of(forests(), forests(aliased=True)), st.data())
@settings(max_examples=200)
def test_every_row_sees_every_position_that_it_must_once_and_no_other(
    forest: Forest, data: st.DataObject
) -> None:
    cut = Tiling(
        page_size=forest.page_size,
        kv_heads=data.draw(st.sampled_from([1, 2, 8])),
        narrow_rows=data.draw(st.integers(1, 4)),
        wide_rows=data.draw(st.sampled_from([4, 5, 8, 12, 64, 128])),
        block_pages=data.draw(st.sampled_from([1, 2, 4, 5])),
        workers=data.draw(st.sampled_from([1, 7, 64, 264])),
        costs=H200,
    )
    if cut.wide_rows < 128 and data.draw(st.booleans()):
        cut = with_tall(cut, data.draw(st.sampled_from([1, 7, 132])))
    order, tiles = lay_out_tiles(Reads.of(forest.reads), capacity_for(forest.reads, cut))
    check(forest.reads, order, tiles, cut)


@given(forests(page_sizes=(16, 64)), st.sampled_from([1, 2, 5, 8]), st.sampled_from([64, 128]))
@settings(max_examples=60)
def test_so_it_does_with_the_tiles_of_a_gpu(forest: Forest, group: int, lanes: int) -> None:
    cut = tiling(group, forest.page_size, lanes=lanes)
    order, tiles = lay_out_tiles(Reads.of(forest.reads), capacity_for(forest.reads, cut))
    check(forest.reads, order, tiles, cut)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("group", [1, 2, 5, 8])
@pytest.mark.parametrize("workers", [1, 264])
def test_a_step_of_everything_is_covered(page_size: int, group: int, workers: int) -> None:
    cut = tiling(group, page_size, workers=workers)
    reads = mixed_reads(page_size)
    order, tiles = lay_out_tiles(Reads.of(reads), capacity_for(reads, cut))
    check(reads, order, tiles, cut)


def test_nothing_to_read_is_an_empty_list() -> None:
    order, tiles = lay_out_tiles(Reads.of([]), TileCapacity.for_bucket(8, 16, tiling()))
    assert len(order) == 0
    assert tiles.num_tiles == 0
    assert not tiles.row_parts.any()


def test_a_malformed_read_is_refused() -> None:
    reads = Reads.of([Read((), PageRun([1], 65), 1, 64)])
    with pytest.raises(ValueError, match="pages"):
        lay_out_tiles(reads, TileCapacity.for_bucket(1, 16, tiling()))


@given(forests(), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 64]), st.booleans())
@settings(max_examples=100)
def test_the_bucket_capacity_always_suffices(
    forest: Forest, wide_rows: int, workers: int, tall: bool
) -> None:
    cut = Tiling(forest.page_size, 1, 1, wide_rows, block_pages=2, workers=workers, costs=H200)
    cut = with_tall(cut, workers) if tall else cut
    rows = sum(read.rows for read in forest.reads)
    pages = len({page for read in forest.reads for page in pages_of(read)})
    longest = max(len(pages_of(read)) for read in forest.reads)
    for capacity in (
        TileCapacity.for_bucket(rows, pages, cut),
        TileCapacity.for_bucket(rows, pages, cut, pages_per_read=longest),
    ):
        order, tiles = lay_out_tiles(Reads.of(forest.reads), capacity)
        assert sorted(order) == list(range(len(forest.reads)))
        assert all(array.size <= room.size for array, room in zip(tiles, capacity.empty(), strict=True))
        assert {array.dtype for array in tiles} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("tiles_more", "slots"), [(32, 10), (3, 264), (0, 264), (32, 0)])
def test_splitting_is_coarsened_until_it_fits(tiles_more: int, slots: int) -> None:
    reads, cut = groups(1, 8, prefix=4096, tail=256), tiling()
    capacity = TileCapacity(8, 1 + tiles_more, page_refs=200, slots=slots, tiling=cut)
    order, tiles = lay_out_tiles(Reads.of(reads), capacity)
    check(reads, order, tiles, cut)


def test_what_just_fits_is_neither_coarsened_nor_refused() -> None:
    reads, cut = groups(1, 8, prefix=4096, tail=256), tiling()
    plenty = plan(reads, cut)
    count = int(plenty.num_tiles)
    slots = int(plenty.tile_rows[:count, 1][plenty.tile_part[:count] >= 0].sum())
    exact = TileCapacity(8, count, references(plenty), slots, cut)
    _, tiles = lay_out_tiles(Reads.of(reads), exact)
    assert tiles.num_tiles == count
    for less in (replace(exact, tiles=count - 1), replace(exact, slots=slots - 1)):
        _, tiles = lay_out_tiles(Reads.of(reads), less)
        assert 1 < tiles.num_tiles < count, "by fewer workers, but split"

    reads, cut = groups(1, 4, prefix=128, tail=4096), tiling(16, workers=1)
    for page_refs, count in ((4 * 66, 4), (4 * 66 - 1, 1)):
        _, tiles = lay_out_tiles(Reads.of(reads), TileCapacity(4, 4, page_refs, slots=4, tiling=cut))
        assert tiles.num_tiles == count


def test_rows_share_even_at_a_loss_where_references_are_short() -> None:
    reads, cut = groups(1, 4, prefix=128, tail=4096), tiling(16, workers=1)
    order, tiles = lay_out_tiles(
        Reads.of(reads), TileCapacity(4, 4, page_refs=2 + 4 * 64, slots=4, tiling=cut)
    )
    check(reads, order, tiles, cut)
    assert tiles.num_tiles == 1


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        (TileCapacity(rows=9, tiles=9, page_refs=99, slots=9, tiling=tiling()), "10 rows"),
        (TileCapacity(rows=10, tiles=1, page_refs=99, slots=9, tiling=tiling()), "2 tiles"),
        (TileCapacity(rows=10, tiles=9, page_refs=29, slots=9, tiling=tiling()), "30 page references"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_does_not(capacity: TileCapacity, message: str) -> None:
    reads = groups(2, 5, 640, 64)
    with pytest.raises(ValueError, match=message):
        lay_out_tiles(Reads.of(reads), capacity)
