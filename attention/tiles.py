"""What a step's query rows read, cut for a GPU: KV page lists in, `TileList` out. NumPy only.

A tile is a run of rows in tree order and the pages that they read, with one KV head's keys and values of each
page read once for all of the tile's rows. What all rows see whole comes first, the rest (tails, nested
prefixes, a prompt chunk's diagonal) after it, masked. A whole group of branches is one tile without partial
results, unless it is split so that all of the device has work.
"""

from __future__ import annotations

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
    row_parts    first entry in part_slots, count: the row's partial results; none where a tile is final
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

    Bits 0-7 valid (1..128), 8-14 first (0..127), 15-22 end (1..128), 23-31 causal + 256 (causal in -256..255).
    As no offset exceeds 127, a causal of 255 is no limit.
    """
    word = valid | first << 8 | end << 15 | (causal + 256) << 23
    return word.astype(np.uint32).view(np.int32)


def unpack_sees(word: Int32[Any, "..."]) -> tuple[Any, Any, Any, Any]:
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
    order = lists.tree_order()
    pieces = _Pieces.of(lists.take(order), tiling.wide_rows)
    check_fits("rows", int(pieces.row_end[-1]), capacity.rows)

    tiles = _Tiles.of(pieces, _cut(pieces, tiling), tiling)
    check_fits("tiles", len(tiles.row), capacity.tiles)
    check_fits("page references", len(tiles.page_ids), capacity.page_refs)
    parts = _split(tiles, capacity)
    parts.write(tiles, out)
    return order, out


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Reads in tree order, those of many rows cut so that each piece fits a tile.

    shared  leading pages that all rows of the piece and of the one before it see whole
    whole   leading pages that all rows of the piece see whole
    count   leading pages of which some row of the piece sees something
    """

    lists: PageLists
    offset: np.ndarray
    row: np.ndarray
    row_end: np.ndarray
    seen: np.ndarray
    shared: np.ndarray
    whole: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, lists: PageLists, most_rows: int) -> _Pieces:
        pieces = -(-lists.rows // most_rows)
        read = np.repeat(np.arange(len(pieces)), pieces)
        before = ragged_ranges(np.zeros_like(pieces), pieces) * most_rows
        rows = np.minimum(lists.rows[read] - before, most_rows)
        row_end = np.cumsum(rows)
        offset, seen = lists.offset[read], lists.seen[read] + before
        whole, count = lists.whole[read], lists.count[read]
        long = np.flatnonzero(lists.rows[read] > 1)
        base = lists.filled[offset[long]]
        by_first = np.searchsorted(lists.filled, base + seen[long], side="right") - 1
        by_last = np.searchsorted(lists.filled, base + seen[long] + rows[long] - 1)
        whole[long] = np.minimum(by_first - offset[long], count[long])
        count[long] = by_last - offset[long]
        shared = np.where(before > 0, np.roll(whole, 1), lists.shared_with_previous()[read])
        return cls(lists, offset, row_end - rows, row_end, seen, shared, whole, count)


def _cut(pieces: _Pieces, tiling: Tiling) -> np.ndarray:
    """The first piece of every tile: runs of pieces that share something, of at most wide_rows rows."""
    first, start = [], 0
    ends, shared = pieces.row_end.tolist(), pieces.shared.tolist()
    for piece, end in enumerate(ends):
        if not shared[piece] or end - start > tiling.wide_rows:
            first.append(piece)
            start = ends[piece - 1] if piece else 0
    return np.array(first, np.int64)


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
        alone = first == last
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
        position = lists.filled[refs[cut]] - lists.filled[pieces.offset[own_piece]]
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
        return cls(tile, row + first, row + end, whole, masked, (block > 0) | (stop < 2**30))

    def write(self, tiles: _Tiles, out: TileList) -> None:
        blocks = self.whole[:, 1] - self.whole[:, 0] + self.masked[:, 1] - self.masked[:, 0]
        order = np.argsort(-blocks, kind="stable")
        rows = np.where(self.split, self.row_end - self.row, 0)[order]
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
        out.row_parts[:, 1] = parts

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
    """Cut the tiles, laid end to end, into pieces of the same length, as many as the device has workers."""
    tiling = capacity.tiling
    blocks = sum(-(-(x[:, 1] - x[:, 0]) // tiling.block_pages) for x in (tiles.whole, tiles.masked))
    end = np.cumsum(blocks)
    every = np.arange(len(blocks))
    workers = tiling.head_workers
    while workers > 1:
        cuts = np.arange(1, workers) * end[-1] // workers
        tile = np.searchsorted(end, cuts, side="right")
        keys = np.unique(np.concatenate([every << 32, tile << 32 | (cuts - (end - blocks)[tile])]))
        parts = _Parts.of(tiles, keys >> 32, keys & 0xFFFFFFFF, tiling)
        slots = (parts.row_end - parts.row)[parts.split].sum()
        if len(keys) <= capacity.tiles and slots <= capacity.slots:
            return parts
        workers //= 2
    return _Parts.of(tiles, every, np.zeros_like(every), tiling)
