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
        return COSTS.partial * max(1, 16 // self.narrow_rows)

    def block_seconds(self, rows: np.ndarray) -> np.ndarray:
        """What a tile of so many rows takes a worker for a block, of one head."""
        tokens = self.block_pages * self.page_size
        return tokens * np.where(rows > self.narrow_rows, COSTS.wide_token, COSTS.narrow_token)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that a worker needs while all are busy; with head_dim 128 in bfloat16. Only ratios matter.

    Measured on an H200 with 264 workers, which then stream 4.06 (narrow) and 3.6 (wide) TB/s together; but
    `alone` is an estimate.
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
        `pages_per_read` (the longest context in pages) bounds that. Each tile may mask pages that others have
        as whole ones, to fill a block.
        """
        longest = num_pages if pages_per_read is None else min(num_pages, pages_per_read)
        cuts = min(rows - 1, 2 * rows // (tiling.wide_rows + 1))
        return cls(
            rows=rows,
            tiles=rows + tiling.head_workers,
            page_refs=min(num_pages + rows + cuts * longest, rows * longest)
            + rows * (tiling.block_pages - 1),
            slots=rows + tiling.head_workers * min(rows, tiling.wide_rows),
            tiling=tiling,
        )

    def empty(self) -> TileList:
        return TileList(
            tile_rows=np.zeros((self.tiles, 2), np.int32),
            tile_whole=np.zeros((self.tiles, 2), np.int32),
            tile_masked=np.zeros((self.tiles, 2), np.int32),
            tile_part=np.full(self.tiles, -1, np.int32),
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
    tile_part    -1: what the tile computes is final; else where part_slots has the slot of its first row's
                 partial result, which the other rows' follow
    page_ids     page of each reference; tiles may share references
    page_sees    who sees what of it, packed (`pack_sees`); of masked references only
    row_parts    first slot, count: the row's partial results; a count of -1 where a tile is final
    part_slots   slots of the partial results, tile by tile
    """

    tile_rows: Int32[Any, "tiles 2"]
    tile_whole: Int32[Any, "tiles 2"]
    tile_masked: Int32[Any, "tiles 2"]
    tile_part: Int32[Any, " tiles"]
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


def refilled(word: Int32[Any, " refs"], valid: Int32[Any, " refs"]) -> Int32[Any, " refs"]:
    """The words of the same pages with `valid` positions filled; of an empty page nobody sees anything."""
    end = word & (0xFF << 15)
    others = word & ~(0xFF | 0xFF << 15)
    return others | end * (valid > 0) | (valid + (valid == 0))


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
    if len(tiles.page_ids) > capacity.page_refs:
        tiles = _Tiles.of(pieces, _cut_least(pieces, tiling), tiling)
    check_fits("tiles", len(tiles.row), capacity.tiles)
    check_fits("page references", len(tiles.page_ids), capacity.page_refs)
    _split(tiles, capacity).write(tiles, out)
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

    A wide tile reads what its rows share once, but takes longer than narrow ones for every page. So rows go
    into wide tiles where they share much beside what they have alone, and into narrow ones where they do not.
    """
    rows, shared = pieces.row_end - pieces.row, pieces.shared
    page = COSTS.narrow_token * tiling.page_size
    more = COSTS.wide_token * tiling.page_size - page
    again = np.where(shared > 0, page * shared + COSTS.tile, 0)  # to cut here
    alone = pieces.count - np.maximum(shared, np.append(shared[1:], 0))
    small = rows <= tiling.narrow_rows
    joins = ~small | (np.maximum(again, np.append(again[1:], 0)) > tiling.narrow_rows * more * alone)
    first = _pack(pieces, np.append(False, joins[1:] & joins[:-1]), again, tiling.wide_rows)

    # A tile stays if what narrow ones would read again costs more than what a wide one takes longer.
    start = np.flatnonzero(first)
    size = np.diff(np.append(start, len(rows)))
    inner, cuts = np.where(first, 0, shared), np.ceil(np.add.reduceat(rows, start) / tiling.narrow_rows) - 1
    saved = cuts * np.add.reduceat(np.where(first, 0, again), start) / np.maximum(size - 1, 1)
    stays = saved >= more * np.add.reduceat(pieces.count - inner, start)
    apart = small & ~(joins & np.repeat(stays, size))
    if apart.any():
        narrow = _pack(pieces, np.append(False, apart[1:] & apart[:-1]), again, tiling.narrow_rows)
        first = np.where(apart | np.append(False, apart[:-1]), narrow, first)
    return np.flatnonzero(first)


def _cut_least(pieces: _Pieces, tiling: Tiling) -> np.ndarray:
    """The first piece of every tile so that page references are few: all that share are together."""
    link = pieces.shared > 0
    return np.flatnonzero(_pack(pieces, link, tiling.page_size * pieces.shared + 1.0, tiling.wide_rows))


def _pack(pieces: _Pieces, link: np.ndarray, cost: np.ndarray, most_rows: int) -> np.ndarray:
    """Is a piece the first of its tile? Linked neighbours share a tile where they share pages.

    Runs of more than most_rows rows are cut, before piece i at cost[i], as cheaply as that can be done.
    """
    first = ~link | (pieces.shared == 0)
    start = np.flatnonzero(first)
    size = np.diff(np.append(start, len(first)))
    rows = pieces.row_end[start + size - 1] - pieces.row[start]
    long = (rows > most_rows) & (size > 1)
    if not long.any():
        return first

    # Branches of one prefix, a row each, share the same everywhere: any cuts will do, so even ones.
    least = np.minimum.reduceat(np.where(first, np.inf, cost), start)
    even = long & (rows == size) & (least == np.maximum.reduceat(np.where(first, 0, cost), start))
    each = -(-rows // -(-rows // most_rows))
    position = np.arange(len(first)) - np.repeat(start, size)
    first |= np.repeat(even, size) & (position % np.repeat(each, size) == 0)
    for run in np.flatnonzero(long & ~even).tolist():
        inside = slice(start[run], start[run] + size[run])
        start_row, end_row, costs = (values[inside].tolist() for values in (pieces.row, pieces.row_end, cost))
        first[start[run] + np.array(_cheapest_cuts(start_row, end_row, costs, most_rows))] = True
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

    sees_*  who sees what of the masked references, all tiles' end to end; rows are counted from the tile's
            first
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
        lists = pieces.lists
        last = np.append(first[1:], len(pieces.row)) - 1
        inner = pieces.shared.copy()
        inner[first] = pieces.whole[first]
        common = np.minimum.reduceat(inner, first)
        partial = np.flatnonzero(lists.valid < tiling.page_size)

        # Leading pages of the tiles' lists that all of their rows see whole: the full ones are tile_whole.
        offset = pieces.offset[first]
        bounds = np.searchsorted(partial, np.stack([offset, offset + common]))
        not_full = bounds[1] - bounds[0]
        full = common - not_full
        leader = _leaders(common, pieces.shared[first])
        own = np.flatnonzero(leader == np.arange(len(first)))
        end = np.cumsum(full[own])
        whole = (end - full[own])[np.searchsorted(own, leader)]
        listed = ragged_ranges(offset[own], common[own])
        listed = listed[lists.valid[listed] == tiling.page_size]

        # The other pages are masked, and full ones that would leave a block unfilled where these have room.
        depth = pieces.shared.copy()
        depth[first] = common
        new = pieces.count - depth
        masked = not_full + np.add.reduceat(new, first)
        size = tiling.block_pages
        spare = full % size
        spare[(masked + spare - 1) // size != (masked - 1) // size] = 0
        full, masked = full - spare, masked + spare
        piece = np.repeat(np.arange(len(new)), new)
        refs = ragged_ranges(pieces.offset + depth, new)
        depth = refs - pieces.offset[piece]
        if len(refs) < masked.sum():
            seen_by_all = ragged_ranges(whole + full, spare), ragged_ranges(bounds[0], not_full)
            piece = np.concatenate([np.repeat(first, spare), np.repeat(first, not_full), piece])
            refs = np.concatenate([listed[seen_by_all[0]], partial[seen_by_all[1]], refs])
            depth = np.append(
                np.zeros(len(piece) - len(depth), np.int64), depth
            )  # any that all have in common
            by_piece = np.argsort(piece, kind="stable")
            piece, refs, depth = piece[by_piece], refs[by_piece], depth[by_piece]
        end = len(listed) + np.cumsum(masked)
        tile = np.repeat(np.arange(len(first)), last - first + 1)
        return cls(
            pieces.row[first],
            pieces.row_end[last],
            np.stack([whole, whole + full], 1),
            np.stack([end - masked, end], 1),
            lists.pages[np.concatenate([listed, refs])],
            lists.valid[refs],
            *_sees(pieces, piece, depth, first[tile[piece]], last[tile[piece]]),
        )


def _leaders(common: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """For each tile, the tile whose list begins with its own list: so both can point at the same references.

    The first common[t] pages of tile t are its list, and it shares shared[t] with the tile before it.
    """
    index = np.arange(len(common))
    overlap = np.minimum(np.minimum(common[1:], common[:-1]), shared[1:])
    up, down = np.zeros_like(common, bool), np.zeros_like(common, bool)
    up[:-1] = overlap == common[:-1]
    down[1:] = (overlap == common[1:]) & ~up[1:] & ~up[:-1]
    # A run of tiles whose lists grow ends at its leader; one whose lists shrink begins there.
    grown = np.minimum.accumulate(np.where(up, len(up), index)[::-1])[::-1]
    return np.where(up, grown, np.maximum.accumulate(np.where(down, 0, index)))


def _sees(
    pieces: _Pieces, piece: np.ndarray, depth: np.ndarray, tile_first: np.ndarray, tile_last: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first row, end, causal) of masked references; rows are counted from the tile's first.

    piece: the first that sees the page, as the depth-th of its list; tile_first, tile_last: of the tile.
    """
    final = piece.copy()  # the last piece that sees the page
    more = np.flatnonzero(final < tile_last)
    while len(more):
        more = more[pieces.shared[final[more] + 1] > depth[more]]
        final[more] += 1
        more = more[final[more] < tile_last[more]]

    tile_row = pieces.row[tile_first]
    first = pieces.row[piece] - tile_row
    causal = np.full(len(piece), NO_LIMIT)
    cut = np.flatnonzero(depth >= pieces.whole[piece])
    if len(cut):
        own = piece[cut]
        before = pieces.lists.positions_before(pieces.read[own], depth[cut])
        causal[cut] = np.minimum(pieces.seen[own] - 1 - before - first[cut], NO_LIMIT)
        first[cut] = np.maximum(first[cut], -causal[cut])
    return first, pieces.row_end[final] - tile_row, causal


@dataclass(frozen=True, slots=True)
class _Parts:
    """Tiles after splitting, in the order of the tiles. Ranges of page references are [first, end)."""

    tile: np.ndarray
    row: np.ndarray
    row_end: np.ndarray
    whole: np.ndarray  # [parts, 2]
    masked: np.ndarray  # [parts, 2]
    blocks: np.ndarray
    slots: np.ndarray  # partial results: the rows of a tile in several parts, else none
    seconds: np.ndarray  # of a worker

    @classmethod
    def unsplit(cls, tiles: _Tiles, tiling: Tiling) -> _Parts:
        every = np.arange(len(tiles.row))
        nothing = np.zeros_like(every)
        return cls._of(every, tiles.row, tiles.row_end, tiles.whole, tiles.masked, nothing, tiling)

    @classmethod
    def split(cls, tiles: _Tiles, tile: np.ndarray, block: np.ndarray, tiling: Tiling) -> _Parts:
        """Parts that begin at block `block` of tile `tile`; every tile has one that begins at 0."""
        size, last = tiling.block_pages, np.append(block[1:] == 0, True)
        stop = np.where(last, 2**30, np.append(block[1:], 0))
        bounds = size * np.stack([block, stop], 1)
        row, row_end, whole, masked = (
            tiles.row[tile],
            tiles.row_end[tile],
            tiles.whole[tile],
            tiles.masked[tile],
        )
        bounds_masked = masked[:, :1] + bounds - size * _blocks(whole, size)[:, None]
        whole = np.minimum(whole[:, :1] + bounds, whole[:, 1:])
        masked = np.clip(bounds_masked, masked[:, :1], masked[:, 1:])

        # All rows see whole pages; of the others, perhaps not all see one.
        some = np.flatnonzero(masked[:, 0] < masked[:, 1])
        starts = masked[some, 0] - tiles.masked[0, 0]
        none_whole = whole[some, 0] == whole[some, 1]
        first = np.minimum.reduceat(tiles.sees_first, starts)[none_whole]
        end = np.maximum.reduceat(tiles.sees_end, starts)[none_whole]
        some = some[none_whole]
        row_end[some] = row[some] + end
        row[some] += first
        slots = np.where((block > 0) | ~last, row_end - row, 0)
        return cls._of(tile, row, row_end, whole, masked, slots, tiling)

    @classmethod
    def _of(
        cls,
        tile: np.ndarray,
        row: np.ndarray,
        row_end: np.ndarray,
        whole: np.ndarray,
        masked: np.ndarray,
        slots: np.ndarray,
        tiling: Tiling,
    ) -> _Parts:
        blocks = _blocks(whole, tiling.block_pages) + _blocks(masked, tiling.block_pages)
        seconds = COSTS.tile + blocks * tiling.block_seconds(row_end - row)
        return cls(tile, row, row_end, whole, masked, blocks, slots, seconds)

    def predict(self, tiling: Tiling) -> tuple[float, float]:
        """Seconds that the parts take together, and that they would take if the load were even."""
        workers = tiling.head_workers
        mean = (self.seconds.sum() + tiling.partial_seconds * self.slots.sum()) / workers
        # Longest first, as many at a time as there are workers, and the longest to whoever has least.
        rounds = -(-len(self.seconds) // workers)
        ranked = np.zeros(rounds * workers)
        ranked[len(ranked) - len(self.seconds) :] = np.sort(self.seconds)
        load = np.zeros(workers)
        for begin in range(len(ranked) - workers, -1, -workers):
            load = np.sort(load)[::-1] + ranked[begin : begin + workers]
        longest = max(mean, load.max())
        # Who is left at the end has more of the memory's bandwidth.
        return mean + COSTS.alone * (longest - mean), mean

    def write(self, tiles: _Tiles, out: TileList) -> None:
        order = np.argsort(-self.seconds, kind="stable")
        count = len(order)
        rows, slots = (self.row_end - self.row)[order], self.slots[order]
        out.num_tiles[...] = count
        out.tile_rows[:count, 0] = self.row[order]
        out.tile_rows[:count, 1] = rows
        for ours, theirs in ((self.whole, out.tile_whole), (self.masked, out.tile_masked)):
            theirs[:count, 0] = ours[order, 0]
            theirs[:count, 1] = (ours[:, 1] - ours[:, 0])[order]

        if slots.any():
            out.tile_part[:count] = np.where(slots > 0, np.cumsum(slots) - slots, -1)
            slot_row = ragged_ranges(self.row[order], slots)
            out.part_slots[np.argsort(slot_row, kind="stable")] = np.arange(len(slot_row))
            parts = np.bincount(slot_row, minlength=len(out.row_parts))
            out.row_parts[:, 0] = np.cumsum(parts) - parts
            out.row_parts[:, 1] = parts
        final = out.row_parts[: tiles.row_end[-1], 1]
        final[final == 0] = -1

        out.page_ids[: len(tiles.page_ids)] = tiles.page_ids
        # Who sees a page is told from the first row of the part, which may not be the tile's.
        skipped = np.repeat(self.row - tiles.row[self.tile], self.masked[:, 1] - self.masked[:, 0])
        out.page_sees[tiles.masked[0, 0] : len(tiles.page_ids)] = pack_sees(
            tiles.sees_valid,
            tiles.sees_first - skipped,
            tiles.sees_end - skipped,
            np.minimum(tiles.sees_causal + skipped, NO_LIMIT),
        )


def _split(tiles: _Tiles, capacity: TileCapacity) -> _Parts:
    """The tiles as they are, or cut for an even load where that is predicted to be faster.

    To cut, the tiles are laid end to end and the line is divided evenly among all or some of the workers.
    """
    tiling = capacity.tiling
    best = _Parts.unsplit(tiles, tiling)
    seconds, mean = best.predict(tiling)
    if seconds < 1.05 * mean:
        return best
    block_seconds = tiling.block_seconds(tiles.row_end - tiles.row)
    blocks, end, previous = best.blocks, np.cumsum(best.seconds), np.inf
    for share in (1, 2, 3, 4, 6, 8):
        workers = tiling.head_workers // share
        if workers < 2:
            break
        cuts = np.arange(1, workers) * end[-1] / workers
        tile = np.searchsorted(end, cuts, side="right")
        block = blocks[tile] - np.rint((end[tile] - cuts) / block_seconds[tile]).astype(np.int64)
        # A short end of a tile is not worth a part of its own.
        least = np.maximum(cuts[0] / 8 / block_seconds[tile], 1)
        worth = (least <= block) & (block <= blocks[tile] - least)
        begin = np.unique(np.append(np.arange(len(blocks)) << 32, tile[worth] << 32 | block[worth]))
        parts = _Parts.split(tiles, begin >> 32, begin & 0xFFFFFFFF, tiling)
        if len(begin) > capacity.tiles or parts.slots.sum() > capacity.slots:
            continue
        predicted, _ = parts.predict(tiling)
        if predicted < seconds:
            best, seconds = parts, predicted
        elif predicted > previous:
            break
        previous = predicted
    return best


def _blocks(refs: np.ndarray, block_pages: int) -> np.ndarray:
    """Blocks of references in the ranges [first, end)."""
    return -((refs[:, 0] - refs[:, 1]) // block_pages)
