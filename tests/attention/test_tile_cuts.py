"""Which rows share a tile: where a step's rows are cut, and what each tile then reads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attention import tile_cuts
from attention.reads import PageRun, Read, Reads
from attention.tile_planner import lay_out_tiles
from attention.tiles import Costs
from tests.attention.forest import Forest
from tests.attention.tile_lists import capacity_for, groups, plan, references, tiling, with_tall


def test_a_group_is_one_wide_tile_without_partial_results() -> None:
    tiles = plan(groups(1, 8, prefix=640, tail=100), tiling(workers=1))
    assert tiles.num_tiles == 1
    assert tiles.tile_rows[0].tolist() == [0, 8]
    assert tiles.tile_whole[0].tolist() == [0, 10]
    assert tiles.tile_masked[0].tolist() == [10, 16]
    assert tiles.tile_part[0] == -1


def test_rows_that_share_nothing_are_narrow_tiles_of_their_own() -> None:
    tiles = plan(groups(5, 1, prefix=0, tail=1000), tiling(workers=1))
    assert tiles.tile_rows[:5].tolist() == [[row, 1] for row in range(5)]
    assert tiles.tile_whole[:5, 1].tolist() == [15] * 5
    assert tiles.tile_masked[:5, 1].tolist() == [1] * 5


def test_a_group_wider_than_a_tile_lists_its_prefix_once() -> None:
    tiles = plan(groups(1, 128, prefix=8192, tail=256), tiling(workers=1))
    assert tiles.num_tiles == 16
    assert (tiles.tile_whole[:16] == tiles.tile_whole[0]).all()
    assert references(tiles) == 128 + 128 * 4


def test_equal_branches_wider_than_a_tile_are_cut_evenly() -> None:
    tiles = plan(groups(1, 27, prefix=8192, tail=256), tiling(workers=1))
    assert sorted(tiles.tile_rows[: tiles.num_tiles, 1].tolist()) == [6, 7, 7, 7]


def test_a_prompt_chunk_lists_its_context_once() -> None:
    chunk = Read((), PageRun(list(range(40)), 2500), rows=497, ordinal=2003)
    tiles = plan([chunk], tiling(workers=1))
    count = int(tiles.num_tiles)
    assert count == 63
    assert len(set(tiles.tile_whole[:count, 0])) == 1
    assert tiles.tile_whole[:count, 1].max() == 39
    assert tiles.tile_masked[:count, 1].max() == 2  # the diagonal: eight rows cross one page border at most
    assert references(tiles) == 39 + tiles.tile_masked[:count, 1].sum()


@pytest.mark.parametrize(
    ("group", "rows", "tiles", "longest"),
    [(8, 512, 32, 136), (8, 384, 48, 67), (2, 512, 16, 68), (2, 256, 16, 33)],
)
def test_tall_tiles_of_a_prompt_chunk_fill_the_device_in_whole_rounds(
    group: int, rows: int, tiles: int, longest: int
) -> None:
    """Of 16 at a time: unsplit in two rounds, halves in three or one, quarters in one."""
    context = PageRun(list(range(128)), 8192)
    chunk = Read((context,), PageRun(list(range(128, 136))[: -(-rows // 64)], rows), rows, 0)
    cut = with_tall(tiling(group))
    _, found = lay_out_tiles(Reads.of([chunk]), capacity_for([chunk], cut))
    count = int(found.num_tiles)
    assert count == tiles
    assert (found.tile_rows[:count, 1] == cut.tall_rows).all()
    assert (found.tile_whole[:count, 1] + found.tile_masked[:count, 1]).max() == longest


def test_branches_beside_tall_tiles_are_planned_as_if_these_were_not_there() -> None:
    branches, cut = groups(3, 5, 640, 64), with_tall(tiling())
    chunk = Read((), PageRun(list(range(4000, 4008)), 496), rows=496, ordinal=0)

    def tiles_of(reads: list[Read]) -> list[list[int]]:
        _, tiles = lay_out_tiles(Reads.of(reads), capacity_for(reads, cut))
        ranges = np.concatenate([tiles.tile_rows, tiles.tile_whole[:, 1:]], 1)[: int(tiles.num_tiles)]
        return ranges[ranges[:, 1] <= cut.wide_rows].tolist()

    assert len(tiles_of(branches)) > 3
    assert tiles_of([*branches, chunk]) == tiles_of(branches)


def test_rows_with_little_in_common_stay_in_narrow_tiles() -> None:
    cut = tiling(16, workers=1)
    assert cut.narrow_rows == 1
    apart, together = (plan(groups(1, 4, prefix=prefix, tail=4096), cut) for prefix in (128, 2048))
    assert apart.tile_rows[:4].tolist() == [[row, 1] for row in range(4)]
    assert together.tile_rows[0].tolist() == [0, 4]


# A page takes narrow tiles 1, and wide ones half as much again; nothing else costs.
EXACT = replace(
    tiling(),
    narrow_rows=2,
    wide_rows=8,
    workers=1,
    costs=Costs(narrow_token=2**-6, wide_token=1.5 * 2**-6, tile=0.0, partial=0.0, alone=1.0),
)


def tails(prefix: int, *lengths: int) -> list[Read]:
    """Rows that share a prefix of so many full pages, each with so many of its own."""
    first = prefix + np.cumsum([0, *lengths])
    shared = PageRun(list(range(prefix)), 64 * prefix)
    own = [
        PageRun(list(range(at, at + length)), 64 * length)
        for at, length in zip(first.tolist(), lengths, strict=False)
    ]
    return [Read((shared,), run, rows=1, ordinal=run.length - 1) for run in own]


@pytest.mark.parametrize(("prefix", "sizes"), [(3, [2, 2]), (4, [4])])
def test_a_wide_tile_stays_from_where_it_saves_as_much_as_it_takes_longer(
    prefix: int, sizes: list[int]
) -> None:
    """Two narrow tiles read the prefix once more; a wide one takes half as long again for all pages."""
    tiles = plan(tails(prefix, 1, 1, 1, 1), EXACT)
    assert tiles.tile_rows[: tiles.num_tiles, 1].tolist() == sizes


@pytest.mark.parametrize(("tail", "sizes"), [(7, [8]), (8, [1, 7])])
def test_a_row_with_much_of_its_own_is_left_out_of_a_wide_tile(tail: int, sizes: list[int]) -> None:
    """A narrow tile's rows would each pay half of their own pages for what is shared."""
    tiles = plan(tails(8, *[1] * 7, tail), EXACT)
    assert sorted(tiles.tile_rows[: tiles.num_tiles, 1].tolist()) == sizes


def test_a_few_that_share_much_are_found_among_many_that_share_little() -> None:
    """All start with the same system prompt; four groups share much more, the other rows have long tails."""
    forest = Forest(page_size=64, stride=2053)
    system = forest.segment(128)
    for _ in range(4):
        prefix = forest.segment(1024)
        forest.leaves += [((system, prefix), forest.segment(70), 1) for _ in range(8)]
    forest.leaves += [((system,), forest.segment(3000), 1) for _ in range(20)]
    cut = tiling(workers=1)
    rows = plan(forest.reads, cut).tile_rows[:, 1].tolist()
    assert sorted(row for row in rows if row) == [2] * 10 + [8] * 4


def test_rows_that_share_a_prefix_are_together_and_others_that_share_little_are_narrow() -> None:
    forest = Forest(page_size=64, stride=1)
    system, prefix = forest.segment(128), forest.segment(640)
    forest.leaves = [((system,), forest.segment(3000), 1) for _ in "EF"]
    forest.leaves += [((system, prefix), forest.segment(10), 1) for _ in "ABCD"]
    tiles = plan(forest.reads, tiling(workers=1))
    assert sorted(tiles.tile_rows[: tiles.num_tiles, 1].tolist()) == [2, 4]
    assert tiles.tile_whole[: tiles.num_tiles, 1].max() == 12, "the prefix is read once"


def test_reads_of_the_very_same_pages_share_them() -> None:
    reads = groups(2, 3, prefix=300, tail=70, page_size=16)
    tiles = plan([*reads, *reads], tiling(page_size=16, workers=1))
    assert tiles.num_tiles == 2


def test_whole_pages_fill_up_the_masked_blocks() -> None:
    """Of 16 pages in blocks of four, 15 are full: else five blocks would be read."""
    tiles = plan(groups(1, 1, prefix=0, tail=250, page_size=16), tiling(page_size=16, workers=1))
    assert tiles.tile_whole[0, 1] == 12
    assert tiles.tile_masked[0, 1] == 4


def test_a_run_longer_than_a_tile_is_cut_where_least_is_shared() -> None:
    forest = Forest(page_size=64, stride=2053)
    system = forest.segment(128)
    for width in (5, 3, 6, 2, 7):
        prefix = forest.segment(640)
        forest.leaves += [((system, prefix), forest.segment(10), 1) for _ in range(width)]
    tiles = plan(forest.reads, tiling(workers=1))
    count = int(tiles.num_tiles)
    # Ten pages are cut through nowhere: every tile holds whole groups.
    assert tiles.tile_whole[:count, 1].sum() + tiles.tile_masked[:count, 1].sum() == count * 2 + 5 * 10 + 23


def test_where_nothing_is_shared_no_cuts_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_cuts, "_pack", lambda *_: pytest.fail("there is nothing to pack"))
    assert plan(groups(5, 1, prefix=0, tail=1000), tiling(workers=1)).num_tiles == 5
