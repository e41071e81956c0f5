from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import tile_parts
from attention.gpu import H200
from attention.reads import PageRun, Read, Reads
from attention.tile_parts import Parts
from attention.tile_planner import lay_out_tiles
from attention.tile_reads import Tiles
from attention.tiles import Costs, TileCapacity, TileList, Tiling, pack_sees, refilled, unpack_sees
from tests.attention.forest import Forest, forests, groups_of_branches, mixed_reads, pages_of, positions_seen

NUM_PAGES = 4096  # of a Forest

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


def test_packed_fields_come_back() -> None:
    fields = np.array([[1, 0, 1, -256], [128, 127, 128, 255], [64, 3, 8, -1], [5, 0, 128, 0]])
    words = pack_sees(*fields.T)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(np.stack(unpack_sees(words), 1), fields)
    np.testing.assert_array_equal(np.stack(unpack_sees(jnp.asarray(words)), 1), fields)


def test_a_page_can_be_refilled() -> None:
    words = pack_sees(
        *(np.array(field) for field in ([3, 16, 128], [0, 127, 5], [1, 128, 9], [-256, 255, 7]))
    )
    for convert in (np.asarray, jnp.asarray):
        valid, first, end, causal = unpack_sees(
            refilled(convert(words), convert(np.array([16, 0, 1], np.int32)))
        )
        assert valid.tolist() == [16, 1, 1]
        assert first.tolist() == [0, 127, 5]
        assert end.tolist() == [1, 0, 9]
        assert causal.tolist() == [-256, 255, 7]


def test_nothing_to_read_is_an_empty_list() -> None:
    order, tiles = lay_out_tiles(Reads.of([]), TileCapacity.for_bucket(8, 16, tiling()))
    assert len(order) == 0
    assert tiles.num_tiles == 0
    assert not tiles.row_parts.any()


def plan(reads: list[Read], cut: Tiling) -> TileList:
    order, tiles = lay_out_tiles(Reads.of(reads), capacity_for(reads, cut))
    check(reads, order, tiles, cut)
    return tiles


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


@pytest.mark.parametrize("group", [1, 2, 8, 16])
def test_a_tile_is_priced_as_wide_from_its_first_row_over_a_narrow_ones(group: int) -> None:
    cut = tiling(group)
    rows = np.array([1, cut.narrow_rows, cut.narrow_rows + 1, cut.wide_rows])
    token = cut.block_seconds(rows) / (cut.block_pages * cut.page_size)
    narrow, wide = H200.narrow_token, H200.wide_token
    np.testing.assert_allclose(token, [narrow, narrow, wide, wide])


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


def test_a_malformed_read_is_refused() -> None:
    reads = Reads.of([Read((), PageRun([1], 65), 1, 64)])
    with pytest.raises(ValueError, match="pages"):
        lay_out_tiles(reads, TileCapacity.for_bucket(1, 16, tiling()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 256}, "page_size"),
        ({"wide_rows": 256}, "wide_rows <= 128"),
        ({"narrow_rows": 16}, "narrow_rows <= wide_rows"),
        ({"narrow_rows": 0}, "1 <= narrow_rows"),
        ({"page_size": 0}, "page_size"),
        ({"workers": 0}, "workers"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"block_pages": 0}, "block_pages"),
        ({"alone": True, "block_pages": 2}, "blocks of one page"),
        ({"tall_rows": 8, "tall_workers": 1}, "wide_rows < tall_rows"),
        ({"tall_rows": 129, "tall_workers": 1}, "tall_rows <= 128"),
        ({"tall_rows": 16}, "tall_workers >= 1"),
    ],
)
def test_a_tiling_must_be_possible(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiling(), **change)


def test_a_tiling_may_be_as_small_and_as_large_as_it_says() -> None:
    smallest = replace(tiling(), page_size=1, narrow_rows=1, wide_rows=1, kv_heads=1, workers=1)
    assert smallest.head_workers == 1
    assert replace(smallest, kv_heads=2).head_workers == 1, "a tile is computed by somebody"
    largest = replace(tiling(), page_size=128, narrow_rows=128, wide_rows=128, alone=True)
    assert largest.partial_row_seconds == H200.partial
    assert replace(largest, narrow_rows=2).partial_row_seconds == 8 * H200.partial
