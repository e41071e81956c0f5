"""What a step's query rows read, cut for a GPU: KV page lists in, `TileList` out. NumPy only.

A tile is a run of rows in tree order and the pages that they read, with one KV head's keys and values of each
page read once for all of the tile's rows. What all rows see whole comes first, the rest (tails, nested
prefixes, a prompt chunk's diagonal) after it, masked. A whole group of branches is one tile without partial
results, unless it is split so that all of the device has work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attention.layout import PageLists, Read, check_fits, ragged_ranges

if TYPE_CHECKING:
    from jaxtyping import Int, Int32

MAX_PAGE_SIZE = MAX_ROWS = 128  # what page_sees has bits for
NO_LIMIT = 255  # page_sees: every offset is seen


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a device's kernel cuts a step into tiles. Static: known to the kernel and to the planner.

    page_size    positions of a page
    kv_heads     KV heads; each tile is computed once for each
    narrow_rows  most rows of a narrow tile
    wide_rows    most rows of a wide tile
    block_pages  page references that the kernel reads at once
    workers      (tile, KV head) pairs that the device computes at the same time
    """

    page_size: int
    kv_heads: int
    narrow_rows: int
    wide_rows: int
    block_pages: int
    workers: int

    def __post_init__(self) -> None:
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be in 1..{MAX_PAGE_SIZE}, not {self.page_size}")
        if not 1 <= self.narrow_rows <= self.wide_rows <= MAX_ROWS:
            raise ValueError(f"a Tiling needs 1 <= narrow_rows <= wide_rows <= {MAX_ROWS}")
        if min(self.kv_heads, self.block_pages, self.workers) < 1:
            raise ValueError("a Tiling needs kv_heads, block_pages and workers >= 1")

    @property
    def head_workers(self) -> int:
        """How many tiles the device computes at the same time, with all of their heads."""
        return max(1, self.workers // self.kv_heads)

    @property
    def partial_seconds(self) -> float:
        """Cost of a row's partial result: of its query heads per KV head, 16 of which fill a narrow tile."""
        return COSTS.partial * (16 // self.narrow_rows)

    def page_seconds(self, rows: np.ndarray) -> np.ndarray:
        """What a tile of so many rows needs for a page, with one head."""
        return np.where(rows > self.narrow_rows, COSTS.wide_token, COSTS.narrow_token) * self.page_size


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that a worker needs while all are busy; with head_dim 128 in bfloat16. Only ratios matter.

    Measured on an H200 with 264 workers, which then stream 4.06 (narrow) and 3.6 (wide) TB/s together.
    """

    narrow_token: float = 512 * 264 / 4.06e12  # a key and a value, for the rows of a narrow tile
    wide_token: float = 512 * 264 / 3.6e12
    tile: float = 1.5e-6
    partial: float = 128 * 8 * 264 / 4e12  # one query head's partial result of a row, written and merged
    alone: float = 0.4  # what a token takes a worker while most others idle, relative to the above


COSTS = Costs()


@dataclass(frozen=True, slots=True)
class TileCapacity:
    """Array sizes of the tile lists of one row bucket."""

    rows: int
    tiles: int
    page_refs: int
    slots: int
    tiling: Tiling

    @classmethod
    def for_bucket(
        cls, rows: int, num_pages: int, tiling: Tiling, pages_per_read: int | None = None
    ) -> TileCapacity:
        """Room for every plan of at most `rows` rows.

        Splitting makes one tile more per cut, and there are fewer cuts than `tiling.head_workers`. A pool
        page is referred to once, once more by each read that sees only a part of it, and once more where a
        run of rows that shares it is cut: two neighbours of such a run have more than `wide_rows` rows.
        `pages_per_read` (the longest context in pages) bounds that.
        """
        longest = num_pages if pages_per_read is None else min(num_pages, pages_per_read)
        cuts = min(rows - 1, 2 * rows // (tiling.wide_rows + 1))
        return cls(
            rows=rows,
            tiles=rows + tiling.head_workers,
            page_refs=min(num_pages + rows + cuts * longest, rows * longest),
            slots=rows + tiling.head_workers * min(rows, tiling.wide_rows),
            tiling=tiling,
        )

    def empty(self) -> TileList:
        return TileList(
            tile_rows=np.zeros((self.tiles, 2), np.int32),
            tile_whole=np.zeros((self.tiles, 2), np.int32),
            tile_masked=np.zeros((self.tiles, 2), np.int32),
            tile_slot=np.full(self.tiles, -1, np.int32),
            page_ids=np.zeros(self.page_refs, np.int32),
            page_sees=np.zeros(self.page_refs, np.int32),
            row_parts=np.zeros((self.rows, 2), np.int32),
            part_slots=np.zeros(self.slots, np.int32),
            num_tiles=np.zeros((), np.int32),
        )


class TileList(NamedTuple):
    """The tiles of a step, longest first: int32 arrays, NumPy or JAX; a pytree.

    Entries past the counts are padding. A tile has at least one row and at least one page.

    tile_rows    first row, row count
    tile_whole   first page reference, count: full pages that every row of the tile sees whole
    tile_masked  first page reference, count: its other pages
    tile_slot    -1: what the tile computes is final; else the slot of its first row's partial result, which
                 the other rows' follow
    page_ids     page of each reference; tiles may share references
    page_sees    who sees what of it, packed (`pack_sees`); of masked references only
    row_parts    first entry in part_slots, count: the row's partial results; -1 where a tile is final
    part_slots   slots to merge, row by row
    """

    tile_rows: Int32[Any, "tiles 2"]
    tile_whole: Int32[Any, "tiles 2"]
    tile_masked: Int32[Any, "tiles 2"]
    tile_slot: Int32[Any, " tiles"]
    page_ids: Int32[Any, " page_refs"]
    page_sees: Int32[Any, " page_refs"]
    row_parts: Int32[Any, "rows 2"]
    part_slots: Int32[Any, " slots"]
    num_tiles: Int32[Any, ""]


def pack_sees(
    valid: Int[np.ndarray, " refs"],
    first: Int[np.ndarray, " refs"],
    end: Int[np.ndarray, " refs"],
    causal: Int[np.ndarray, " refs"],
) -> Int32[np.ndarray, " refs"]:
    """Row i of a tile (i = 0 is its first) sees offset o of a page if o < valid, first <= i < end and
    o <= causal + i.

    Bits 0-7 valid (1..128), 8-14 first (0..127), 15-22 end (1..128), 23-31 causal + 256 (causal in
    -256..255). As no offset exceeds 127, a causal of 255 is no limit.
    """
    word = valid | first << 8 | end << 15 | (causal + 256) << 23
    return word.astype(np.uint32).view(np.int32)


def unpack_sees(word: Int32[Any, "*shape"]) -> tuple[Any, Any, Any, Any]:
    """(valid, first, end, causal) of packed words, NumPy or JAX."""
    return word & 0xFF, word >> 8 & 0x7F, word >> 15 & 0xFF, (word >> 23 & 0x1FF) - 256


def plan_tiles(reads: Sequence[Read], capacity: TileCapacity) -> tuple[Int[np.ndarray, " reads"], TileList]:
    """Lay rows out in tree order and cut them into tiles: `order` is as of `attention.layout.plan_rows`.

    Raises:
      ValueError: a read is malformed, or rows, tiles or page references exceed `capacity` however coarsely
        the tiles are split.
    """
    tiling, out = capacity.tiling, capacity.empty()
    if not reads:
        return np.zeros(0, np.int64), out
    lists = PageLists.of(reads, tiling.page_size)
    order, shared = lists.tree_order()
    pieces = _Pieces.of(lists.take(order), shared, tiling.wide_rows)
    check_fits("rows", int(pieces.row_end[-1]), capacity.rows)

    tiles = _Tiles.of(pieces, _cut(pieces, tiling), tiling)
    check_fits("tiles", len(tiles.row), capacity.tiles)
    check_fits("page references", len(tiles.page_ids), capacity.page_refs)
    parts = _split(tiles, capacity)
    parts.write(tiles, tiling, out)
    return order, out


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Reads in tree order, those of many rows cut so that each piece fits a tile.

    shared  leading pages that all rows of the piece and of the one before it see whole
    whole   leading pages that all rows of the piece see whole
    count   leading pages of which some row of the piece sees something
    """

    lists: PageLists
    read: np.ndarray
    offset: np.ndarray
    row: np.ndarray
    row_end: np.ndarray
    seen: np.ndarray
    shared: np.ndarray
    whole: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, lists: PageLists, shared: np.ndarray, most_rows: int) -> _Pieces:
        pieces = -(-lists.rows // most_rows)
        read = np.repeat(np.arange(len(pieces)), pieces)
        before = ragged_ranges(np.zeros_like(pieces), pieces) * most_rows
        rows = np.minimum(lists.rows[read] - before, most_rows)
        row_end = np.cumsum(rows)
        offset, seen = lists.offset[read], lists.seen[read] + before
        whole, count = lists.whole[read], lists.count[read]
        long = np.flatnonzero(lists.rows[read] > 1)
        table = lists.table[read][long]
        base = lists.filled[table]
        by_first = np.searchsorted(lists.filled, base + seen[long], side="right") - 1
        by_last = np.searchsorted(lists.filled, base + seen[long] + rows[long] - 1)
        whole[long] = np.minimum(by_first - table, count[long])
        count[long] = by_last - table
        shared = np.where(before > 0, np.roll(whole, 1), shared[read])
        return cls(lists, read, offset, row_end - rows, row_end, seen, shared, whole, count)


def _cut(pieces: _Pieces, tiling: Tiling) -> np.ndarray:
    """The first piece of every tile, by predicted cost.

    A wide tile reads what its rows share once, but takes longer than a narrow one for every page. So rows
    that share much are put into wide tiles and the others into narrow ones, which cost them nothing.
    """
    rows, shared = pieces.row_end - pieces.row, pieces.shared
    narrow, wide = COSTS.narrow_token * tiling.page_size, COSTS.wide_token * tiling.page_size
    saved = wide * shared + COSTS.tile
    lost = np.where(rows > tiling.narrow_rows, 0, (wide - narrow) * pieces.count)
    gains = np.maximum(saved, np.append(saved[1:], 0)) > lost
    first = _pack(pieces, np.append(False, gains[1:] & gains[:-1]), saved, tiling.wide_rows)

    # What a wide tile loses to narrow ones of a row each.
    start = np.flatnonzero(first)
    tile_rows = np.add.reduceat(rows, start)
    balance = np.add.reduceat(np.where(first, 0, saved) - lost, start)
    loses = (tile_rows > tiling.narrow_rows) & (balance < 0)
    apart = ~gains | np.repeat(loses, np.diff(np.append(start, len(rows))))
    if apart.any():
        link = np.append(False, apart[1:] & apart[:-1])
        first = np.where(apart, _pack(pieces, link, saved, tiling.narrow_rows), first)
    return np.flatnonzero(first)


def _pack(pieces: _Pieces, link: np.ndarray, cost: np.ndarray, most_rows: int) -> np.ndarray:
    """Is a piece the first of its tile? Linked neighbours share a tile where they share pages.

    Runs of more than most_rows rows are cut, before piece i at cost[i], as cheaply as that can be done.
    """
    first = ~link | (pieces.shared == 0)
    start = np.flatnonzero(first)
    end = np.append(start[1:], len(first))
    for run in np.flatnonzero(pieces.row_end[end - 1] - pieces.row[start] > most_rows).tolist():
        inside = slice(start[run], end[run])
        start_row, end_row, costs = (values[inside].tolist() for values in (pieces.row, pieces.row_end, cost))
        cuts = _cheapest_cuts(start_row, end_row, costs, most_rows)
        first[start[run] + np.array(cuts)] = True
    return first


def _cheapest_cuts(start: list[int], end: list[int], cost: list[float], most_rows: int) -> list[int]:
    """Where to cut a run of pieces so that no part exceeds most_rows, at the least sum of the cuts' costs.

    The cheapest way to cut before piece i follows from the cheapest ways up to the pieces that a part which
    ends at i may begin with; of those, `open` holds the ones that a later piece may yet prefer.
    """
    best, came_from = 0.0, []
    open_parts: deque[tuple[float, int]] = deque()
    for piece, last_row in enumerate(end):
        total = best + cost[piece]
        while open_parts and open_parts[-1][0] >= total:
            open_parts.pop()
        open_parts.append((total, piece))
        while last_row - start[open_parts[0][1]] > most_rows:
            open_parts.popleft()
        best, begin = open_parts[0]
        came_from.append(begin)
    cuts, piece = [], len(end)
    while piece:
        piece = came_from[piece - 1]
        cuts.append(piece)
    return cuts


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles before any is split. Ranges of page references are [first, end).

    sees_*  who sees what of the references from masked[0, 0] on; rows are counted from the tile's first
    """

    row: np.ndarray
    row_end: np.ndarray
    whole: np.ndarray  # [tiles, 2]
    masked: np.ndarray  # [tiles, 2]
    page_ids: np.ndarray
    sees_valid: np.ndarray
    sees_first: np.ndarray
    sees_end: np.ndarray
    sees_causal: np.ndarray

    @classmethod
    def of(cls, pieces: _Pieces, first: np.ndarray, tiling: Tiling) -> _Tiles:
        lists, pages = pieces.lists, len(pieces.row)
        last = np.append(first[1:], pages) - 1
        tile = np.repeat(np.arange(len(first)), last - first + 1)
        inside = np.where(np.arange(pages) == first[tile], pieces.whole, pieces.shared)
        common = np.minimum.reduceat(inside, first)

        # Full pages seen by all rows of a tile: a tile whose list continues a neighbour's shares it.
        overlap = np.minimum(np.minimum(common, np.roll(common, 1)), pieces.shared[first])
        overlap[0] = 0
        index = np.arange(len(first))
        up = np.append(overlap[1:] == common[:-1], False)
        down = ~up & (overlap == common) & ~np.roll(up, 1) & (index > 0)
        next_not_up = np.minimum.accumulate(np.where(up, len(up), index)[::-1])[::-1]
        leader = np.where(up, next_not_up, np.maximum.accumulate(np.where(down, 0, index)))
        partial = np.flatnonzero(lists.valid != tiling.page_size)
        offset = pieces.offset[first]
        partial_first = np.searchsorted(partial, offset)
        partial_count = np.searchsorted(partial, offset + common) - partial_first
        full = common - partial_count
        own = np.flatnonzero(leader == index)
        list_end = np.cumsum(full[own])
        whole_start = (list_end - full[own])[np.searchsorted(own, leader)]
        candidates = ragged_ranges(offset[own], common[own])
        whole_refs = candidates[lists.valid[candidates] == tiling.page_size]

        # The other pages, each with the pieces of the tile that read it.
        start = np.where(np.arange(pages) == first[tile], common[tile], pieces.shared)
        new = pieces.count - start
        piece = np.concatenate([np.repeat(first, partial_count), np.repeat(np.arange(pages), new)])
        refs = np.concatenate(
            [partial[ragged_ranges(partial_first, partial_count)], ragged_ranges(pieces.offset + start, new)]
        )
        by_piece = np.argsort(piece, kind="stable")
        piece, refs = piece[by_piece], refs[by_piece]
        depth = refs - pieces.offset[piece]
        end = piece + 1
        tile_end = last[tile[piece]] + 1
        while True:
            more = (end < tile_end) & (pieces.shared[np.minimum(end, pages - 1)] > depth)
            if not more.any():
                break
            end += more
        tile_row = pieces.row[first]
        ref_row = tile_row[tile[piece]]
        causal = np.full(len(refs), NO_LIMIT)
        cut = np.flatnonzero(depth >= pieces.whole[piece])
        own_piece = piece[cut]
        position = lists.positions_before(pieces.read[own_piece], depth[cut])
        lag = pieces.row[own_piece] - ref_row[cut]
        causal[cut] = pieces.seen[own_piece] - 1 - position - lag
        causal = np.minimum(causal, NO_LIMIT)
        valid = lists.valid[refs]
        masked_count = np.bincount(tile[piece], minlength=len(first))
        masked_end = len(whole_refs) + np.cumsum(masked_count)
        return cls(
            row=tile_row,
            row_end=pieces.row_end[last],
            whole=np.stack([whole_start, whole_start + full], 1),
            masked=np.stack([masked_end - masked_count, masked_end], 1),
            page_ids=lists.pages[np.concatenate([whole_refs, refs])],
            sees_valid=valid,
            sees_first=np.maximum(pieces.row[piece] - ref_row, -causal),
            sees_end=pieces.row_end[end - 1] - ref_row,
            sees_causal=causal,
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """Tiles after splitting, in the order of the tiles. Ranges are [first, end)."""

    tile: np.ndarray
    row: np.ndarray
    row_end: np.ndarray
    whole: np.ndarray  # [parts, 2]
    masked: np.ndarray  # [parts, 2]
    blocks: np.ndarray
    split: np.ndarray  # is the part one of several?

    @classmethod
    def of(cls, tiles: _Tiles, tile: np.ndarray, block: np.ndarray, tiling: Tiling) -> _Parts:
        """Parts that begin at block `block` of tile `tile`; every tile has one that begins at 0."""
        size = tiling.block_pages
        whole, masked = tiles.whole[tile], tiles.masked[tile]
        whole_blocks = -(-(whole[:, 1] - whole[:, 0]) // size)
        stop = np.append(np.where(block[1:] > 0, block[1:], 2**30), 2**30)
        blocks = np.stack([block, stop], 1)
        whole = np.minimum(whole[:, :1] + blocks * size, whole[:, 1:])
        masked = np.clip(
            masked[:, :1] + (blocks - whole_blocks[:, None]) * size, masked[:, :1], masked[:, 1:]
        )

        first, end = np.zeros_like(tile), tiles.row_end[tile] - tiles.row[tile]
        some = masked[:, 0] < masked[:, 1]
        starts = masked[some, 0] - tiles.masked[0, 0]
        only = whole[some, 0] == whole[some, 1]
        first[some] = np.where(only, np.minimum.reduceat(tiles.sees_first, starts), 0)
        end[some] = np.where(only, np.maximum.reduceat(tiles.sees_end, starts), end[some])
        row = tiles.row[tile]
        blocks = -((whole[:, 0] - whole[:, 1]) // size + (masked[:, 0] - masked[:, 1]) // size)
        return cls(tile, row + first, row + end, whole, masked, blocks, (block > 0) | (stop < 2**30))

    @property
    def slots(self) -> np.ndarray:
        """Partial results of each part."""
        return np.where(self.split, self.row_end - self.row, 0)

    def costs(self, tiling: Tiling) -> np.ndarray:
        """Seconds of a worker for each part."""
        return COSTS.tile + self.blocks * tiling.block_pages * tiling.page_seconds(self.row_end - self.row)

    def seconds(self, tiling: Tiling) -> tuple[float, float]:
        """Predicted time of a step's attention, and of that if its load were even.

        Where the load is uneven, those who are left at the end have the device to themselves.
        """
        cost = self.costs(tiling)
        workers = tiling.head_workers
        mean = (cost.sum() + tiling.partial_seconds * self.slots.sum()) / workers
        # Of the n * workers + 1 longest parts, some worker gets n + 1.
        shortest = -np.sort(-cost)[::workers]
        longest = max(mean, (shortest * np.arange(1, len(shortest) + 1)).max())
        return mean + COSTS.alone * (longest - mean), mean

    def write(self, tiles: _Tiles, tiling: Tiling, out: TileList) -> None:
        order = np.argsort(-self.costs(tiling), kind="stable")
        rows = self.slots[order]
        count = len(order)
        out.num_tiles[...] = count
        out.tile_rows[:count, 0] = self.row[order]
        out.tile_rows[:count, 1] = (self.row_end - self.row)[order]
        for ours, theirs in ((self.whole, out.tile_whole), (self.masked, out.tile_masked)):
            theirs[:count, 0] = ours[order, 0]
            theirs[:count, 1] = (ours[:, 1] - ours[:, 0])[order]
        out.tile_slot[:count] = np.where(self.split[order], np.cumsum(rows) - rows, -1)

        slot_row = ragged_ranges(self.row[order], rows)
        out.part_slots[: len(slot_row)] = np.argsort(slot_row, kind="stable")
        parts = np.bincount(slot_row, minlength=len(out.row_parts))
        out.row_parts[:, 0] = np.cumsum(parts) - parts
        laid_out = np.arange(len(parts)) < tiles.row_end[-1]
        out.row_parts[:, 1] = np.where(laid_out & (parts == 0), -1, parts)

        out.page_ids[: len(tiles.page_ids)] = tiles.page_ids
        first = np.repeat(self.row - tiles.row[self.tile], self.masked[:, 1] - self.masked[:, 0])
        refs = slice(len(tiles.page_ids) - len(first), len(tiles.page_ids))
        out.page_sees[refs] = pack_sees(
            tiles.sees_valid,
            tiles.sees_first - first,
            tiles.sees_end - first,
            np.minimum(tiles.sees_causal + first, NO_LIMIT),
        )


def _split(tiles: _Tiles, capacity: TileCapacity) -> _Parts:
    """The tiles as they are, or cut for an even load where that is predicted to be faster.

    To cut, the tiles are laid end to end and the line is divided evenly among some or all workers.
    """
    tiling = capacity.tiling
    every = np.arange(len(tiles.row))
    best = _Parts.of(tiles, every, np.zeros_like(every), tiling)
    seconds, mean = best.seconds(tiling)
    if seconds < 1.05 * mean:
        return best
    per_block = tiling.page_seconds(tiles.row_end - tiles.row) * tiling.block_pages
    blocks = best.blocks
    end = np.cumsum(blocks * per_block)
    for workers in {tiling.head_workers // share for share in (1, 2, 3, 4)} - {0, 1}:
        length = end[-1] / workers
        cuts = np.arange(1, workers) * length
        tile = np.searchsorted(end, cuts, side="right")
        block = np.rint((cuts - end[tile]) / per_block[tile]).astype(np.int64) + blocks[tile]
        # A short end is not worth a part of its own.
        least = np.maximum(length / 8 / per_block[tile], 1)
        fair = (block >= least) & (blocks[tile] - block >= least)
        keys = np.unique(np.concatenate([every << 32, tile[fair] << 32 | block[fair]]))
        parts = _Parts.of(tiles, keys >> 32, keys & 0xFFFFFFFF, tiling)
        if len(keys) > capacity.tiles or parts.slots.sum() > capacity.slots:
            continue
        predicted, _ = parts.seconds(tiling)
        if predicted < seconds:
            best, seconds = parts, predicted
    return best
