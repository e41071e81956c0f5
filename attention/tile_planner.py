"""Cuts what a step's query rows read into tiles for a GPU: reads in, `TileList` out. NumPy only.

Where the rows are cut, and which tiles are split so that all of the device has work, is decided by predicted
cost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attention.layout import check_fits
from attention.reads import Reads, ReadTree, ragged_ranges
from attention.tiles import NO_LIMIT, TileCapacity, TileList, Tiling, pack_sees, unpack_sees

if TYPE_CHECKING:
    from jaxtyping import Int


CLOSE = 1.2  # a split this near to an even load is rarely bettered by a coarser one: not worth planning it


def lay_out_tiles(reads: Reads, capacity: TileCapacity) -> tuple[Int[np.ndarray, " reads"], TileList]:
    """`attention.backend.Backend.lay_out`: rows in tree order, cut into tiles.

    Raises ValueError if they exceed `capacity` however coarsely the tiles are split.
    """
    tiling, out = capacity.tiling, capacity.empty()
    if not reads.own:
        return np.zeros(0, np.int64), out
    order, tree = ReadTree.of(reads, tiling.page_size)
    tree = tree.split(tiling.wide_rows)
    check_fits("rows", int(tree.rows.sum()), capacity.rows)

    if tiling.alone:
        tiles = _Tiles.of(tree, np.arange(len(tree.rows)), tiling)
        _check_fits(tiles, capacity)
        _Parts.unsplit(tiles, tiling).write(tiles, out)
        return order, out
    tiles = _Tiles.of(tree, _cut(tree, tiling), tiling)
    if len(tiles.page_ids) > capacity.page_refs:
        tiles = _Tiles.of(tree, _cut_least(tree, tiling), tiling)
    _check_fits(tiles, capacity)
    _split(tiles, capacity).write(tiles, out)
    return order, out


def _check_fits(tiles: _Tiles, capacity: TileCapacity) -> None:
    check_fits("tiles", len(tiles.row), capacity.tiles)
    check_fits("page references", len(tiles.page_ids), capacity.page_refs)


# --- where the rows are cut --------------------------------------------------------------------------------


def _cut(reads: ReadTree, tiling: Tiling) -> np.ndarray:
    """The first read of every tile, by predicted cost.

    A wide tile reads what its rows share once, but takes longer than narrow ones for every page. So rows go
    into wide tiles where they share much beside what they have alone, and into narrow ones where they do not.
    """
    rows, shared, narrow = reads.rows, reads.shared, tiling.narrow_rows
    if not shared.any():
        return np.arange(len(rows))
    page = tiling.costs.narrow_token * tiling.page_size
    more = tiling.costs.wide_token * tiling.page_size - page
    again = page * shared + tiling.costs.tile * (shared > 0)  # to cut here
    beside = shared.copy()  # shared with either neighbour
    np.maximum(shared[:-1], shared[1:], out=beside[:-1])
    again_beside = page * beside + tiling.costs.tile * (beside > 0)
    small = rows <= narrow
    joins = ~small | (again_beside > narrow * more * (reads.count - beside))
    first = _pack(reads, _with_previous(joins), again, tiling.wide_rows)

    # A tile stays if what narrow ones would read again costs more than what a wide one takes longer.
    start = first.nonzero()[0]
    size = _sizes(start, len(rows))
    cuts = -(-np.add.reduceat(rows, start) // narrow) - 1
    saved = cuts * np.add.reduceat(again * ~first, start) / np.maximum(size - 1, 1)
    stays = saved >= more * np.add.reduceat(reads.count - shared * ~first, start)
    apart = small & ~(joins & stays.repeat(size))
    if apart.any():
        narrow_first = _pack(reads, _with_previous(apart), again, narrow)
        apart[1:] |= apart[:-1]
        first = np.where(apart, narrow_first, first)
        start = first.nonzero()[0]
    return start


def _cut_least(reads: ReadTree, tiling: Tiling) -> np.ndarray:
    """The first read of every tile so that page references are few: all that share are together."""
    cost = tiling.page_size * reads.shared + 1.0
    return _pack(reads, reads.shared > 0, cost, tiling.wide_rows).nonzero()[0]


def _pack(reads: ReadTree, link: np.ndarray, cost: np.ndarray, most_rows: int) -> np.ndarray:
    """Is a read the first of its tile? Linked neighbours share a tile where they share pages.

    Runs of more than most_rows rows are cut, before read i at cost[i], as cheaply as that can be done.
    """
    first = ~(link & (reads.shared > 0))
    start = first.nonzero()[0]
    size = _sizes(start, len(first))
    rows = np.add.reduceat(reads.rows, start)
    long = (rows > most_rows) & (size > 1)
    if not long.any():
        return first

    # Branches of one prefix, a row each, share the same everywhere: any cuts will do, so even ones.
    changes = ~first
    changes[1:] &= ~first[:-1] & (cost[1:] != cost[:-1])
    even = long & (rows == size) & ~np.logical_or.reduceat(changes, start)
    each = -(-rows // -(-rows // most_rows))
    position = np.arange(len(first)) - start.repeat(size)
    first |= even.repeat(size) & (position % each.repeat(size) == 0)
    for run in (long & ~even).nonzero()[0].tolist():
        inside = slice(start[run], start[run] + size[run])
        end_row = reads.rows[inside].cumsum()
        start_row = end_row - reads.rows[inside]
        cuts = _cheapest_cuts(start_row.tolist(), end_row.tolist(), cost[inside].tolist(), most_rows)
        first[start[run] + np.array(cuts)] = True
    return first


def _cheapest_cuts(start: list[int], end: list[int], cost: list[float], most_rows: int) -> list[int]:
    """Where to cut a run of reads so that no part exceeds most_rows, at the least sum of the cuts' costs.

    The cheapest way to cut before read i follows from the cheapest ways up to the reads that a part which
    ends at i may begin with; of those, `open` holds the ones that a later read may yet prefer.
    """
    best, came_from = 0.0, []
    open_parts: deque[tuple[float, int]] = deque()
    for read, last_row in enumerate(end):
        total = best + cost[read]
        while open_parts and open_parts[-1][0] >= total:
            open_parts.pop()
        open_parts.append((total, read))
        while last_row - start[open_parts[0][1]] > most_rows:
            open_parts.popleft()
        best, begin = open_parts[0]
        came_from.append(begin)
    cuts, read = [], len(end)
    while read:
        read = came_from[read - 1]
        cuts.append(read)
    return cuts


def _with_previous(flags: np.ndarray) -> np.ndarray:
    """Is a flag set, and the one before it too?"""
    both = np.zeros_like(flags)
    np.logical_and(flags[1:], flags[:-1], out=both[1:])
    return both


def _sizes(start: np.ndarray, end: int) -> np.ndarray:
    """Sizes of the runs that begin at `start`, of which the last stops at `end`."""
    sizes = np.empty_like(start)
    np.subtract(start[1:], start[:-1], out=sizes[:-1])
    sizes[-1] = end - start[-1]
    return sizes


# --- what each tile reads ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles before any is split. Ranges of page references are [first, end).

    page_ids  page of each reference, those of whole ones first
    sees      who sees what of the masked references; rows are counted from the tile's first
    """

    row: np.ndarray
    row_end: np.ndarray
    whole: np.ndarray  # [tiles, 2]
    masked: np.ndarray  # [tiles, 2]
    page_ids: np.ndarray
    sees: np.ndarray

    @classmethod
    def of(cls, reads: ReadTree, first: np.ndarray, tiling: Tiling) -> _Tiles:
        """Tiles that begin with the reads `first`."""
        size = _sizes(first, len(reads.rows))
        tile_rows = np.add.reduceat(reads.rows, first)
        tile_end = tile_rows.cumsum()
        tile_row = tile_end - tile_rows

        # Leading pages of the tiles' reads that all of their rows see whole: the full ones are tile_whole.
        depth = reads.shared.copy()
        depth[first] = (
            np.minimum(reads.whole, reads.leading_full)[first] if tiling.alone else reads.whole[first]
        )
        common = np.minimum.reduceat(depth, first)
        run, run_size = reads.runs(first, 0, common)
        partial = np.searchsorted(reads.partial, run)
        partials = np.searchsorted(reads.partial, run + run_size) - partial
        not_full = partials[:, 0] + partials[:, 1]
        full = common - not_full
        leader = _leaders(common, reads.shared[first])
        own = (leader == np.arange(len(leader))).nonzero()[0]
        end = full[own].cumsum()
        whole = (end - full[own])[np.searchsorted(own, leader)]
        listed = ragged_ranges(run[own], run_size[own])
        if not_full.any():
            listed = listed[reads.valid[listed] == tiling.page_size]

        # The other pages are masked, and full ones that would leave a block unfilled where these have room.
        depth[first] = common
        masked = not_full + np.add.reduceat(reads.count - depth, first)
        spare = _spare(full, masked, tiling.block_pages)
        full, masked = full - spare, masked + spare

        # Of each read, the pages that it brings; before a tile's first, what all of its rows see.
        refs, sizes = np.zeros((2, len(reads.rows), 3), np.int64)
        refs[:, 1:], sizes[:, 1:] = reads.runs(slice(None), depth, reads.count)
        sizes[first, 0] = of_all = spare + not_full
        refs = ragged_ranges(refs, sizes)
        if of_all.any():
            lists = np.concatenate([reads.partial, listed])
            begin = np.column_stack([len(reads.partial) + whole + full, partial])
            at = ragged_ranges(sizes.ravel().cumsum()[3 * first] - of_all, of_all)
            refs[at] = lists[ragged_ranges(begin, np.column_stack([spare, partials]))]

        row_end = reads.rows.cumsum() - tile_row.repeat(size)
        row = row_end - reads.rows
        sees = np.empty((len(row), 3), np.int32)
        sees.T[:] = pack_sees(0, row, row_end)
        sees[first, 0] = pack_sees(0, 0, tile_rows)
        sees = sees.ravel().repeat(sizes.ravel())
        sees |= reads.valid[refs]
        cls._unusual(reads, first, depth, row, row_end, sizes, refs, sees)

        end = len(listed) + masked.cumsum()
        return cls(
            tile_row,
            tile_end,
            np.column_stack([whole, whole + full]),
            np.column_stack([end - masked, end]),
            reads.pages[np.concatenate([listed, refs])],
            sees,
        )

    @staticmethod
    def _unusual(
        reads: ReadTree,
        first: np.ndarray,
        depth: np.ndarray,
        row: np.ndarray,
        row_end: np.ndarray,
        sizes: np.ndarray,
        refs: np.ndarray,
        sees: np.ndarray,
    ) -> None:
        """Corrects `sees` where a page is not seen whole by just the rows of the read that brings it.

        Nested prefixes are seen by the rows of later reads too, a prompt chunk's last pages by later rows.
        depth: where each read's pages begin; row, row_end: counted from its tile's first.
        """
        later = np.append(reads.shared[1:], 0)
        later[first[1:] - 1] = 0
        some = ((depth < later) | (reads.whole < reads.count)).nonzero()[0]
        if not len(some):
            return
        new = reads.count - depth
        before = sizes.ravel().cumsum()[3 * some]
        ref = ragged_ranges(before, new[some])
        read, depth = some.repeat(new[some]), ragged_ranges(depth[some], new[some])

        final = read.copy()  # the last read that sees the page
        more = np.arange(len(final))
        while len(more):
            more = more[later[final[more]] > depth[more]]
            final[more] += 1

        first_row, causal = row[read], np.full(len(read), NO_LIMIT)
        cut = (depth >= reads.whole[read]).nonzero()[0]
        own_row = first_row[cut]
        causal[cut] = np.minimum(reads.causal(read[cut], depth[cut]) - own_row, NO_LIMIT)
        first_row[cut] = np.maximum(own_row, -causal[cut])
        sees[ref] = pack_sees(reads.valid[refs[ref]], first_row, row_end[final], causal)


def _leaders(common: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """For each tile, the tile whose list begins with its own list: so both can point at the same references.

    The first common[t] pages of tile t are its list, and it shares shared[t] with the tile before it.
    """
    index = np.arange(len(common))
    overlap = np.minimum(np.minimum(common[1:], common[:-1]), shared[1:])
    up, down = np.zeros((2, len(common)), bool)
    np.equal(overlap, common[:-1], out=up[:-1])
    np.equal(overlap, common[1:], out=down[1:])
    if not (up.any() or down.any()):
        return index
    down[1:] &= ~up[1:] & ~up[:-1]
    # A run of tiles whose lists grow ends at its leader; one whose lists shrink begins there.
    grown = np.minimum.accumulate(np.where(up, len(up), index)[::-1])[::-1]
    return np.where(up, grown, np.maximum.accumulate(np.where(down, 0, index)))


def _spare(full: np.ndarray, masked: np.ndarray, block: int) -> np.ndarray:
    """How many of each tile's full pages fill no block, but fit into the last block of its masked ones."""
    if block == 1:
        return np.zeros_like(full)
    spare = full % block
    return spare * ((masked + spare - 1) // block == (masked - 1) // block)


# --- which tiles are split ---------------------------------------------------------------------------------


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
        masked = np.minimum(np.maximum(bounds_masked, masked[:, :1]), masked[:, 1:])

        # All rows see whole pages; of the others, perhaps not all see one.
        some = np.flatnonzero(masked[:, 0] < masked[:, 1])
        starts = masked[some, 0] - tiles.masked[0, 0]
        none_whole = whole[some, 0] == whole[some, 1]
        if none_whole.any():
            _, first, end, _ = unpack_sees(tiles.sees)
            some = some[none_whole]
            row_end[some] = row[some] + np.maximum.reduceat(end, starts)[none_whole]
            row[some] += np.minimum.reduceat(first, starts)[none_whole]
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
        seconds = tiling.costs.tile + blocks * tiling.block_seconds(row_end - row)
        return cls(tile, row, row_end, whole, masked, blocks, slots, seconds)

    def predict(self, tiling: Tiling) -> tuple[float, float]:
        """Seconds that the parts take together, and that they would take if the load were even."""
        workers = tiling.head_workers
        mean = (self.seconds.sum() + tiling.partial_row_seconds * self.slots.sum()) / workers
        if len(self.seconds) <= workers:
            return mean + tiling.costs.alone * max(0.0, self.seconds.max() - mean), mean
        # Longest first, as many at a time as there are workers, and the longest to whoever has least.
        rounds = -(-len(self.seconds) // workers)
        ranked = np.zeros(rounds * workers)
        ranked[len(ranked) - len(self.seconds) :] = np.sort(self.seconds)
        load = np.zeros(workers)
        for begin in range(len(ranked) - workers, -1, -workers):
            load = np.sort(load)[::-1] + ranked[begin : begin + workers]
        longest = max(mean, load.max())
        # Who is left at the end has more of the memory's bandwidth.
        return mean + tiling.costs.alone * (longest - mean), mean

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
        skipped = self.row - tiles.row[self.tile]
        sees = tiles.sees
        if skipped.any():
            skipped = skipped.repeat(self.masked[:, 1] - self.masked[:, 0])
            valid, first, end, causal = unpack_sees(sees)
            causal = np.minimum(causal + skipped, NO_LIMIT)
            sees = pack_sees(valid, first - skipped, end - skipped, causal)
        out.page_sees[tiles.masked[0, 0] : len(tiles.page_ids)] = sees


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
    for share in (1, 2, 4, 8):
        workers = tiling.head_workers // share
        if workers < 2 or seconds < CLOSE * mean:
            break
        cuts = np.arange(1, workers) * end[-1] / workers
        tile = np.searchsorted(end, cuts, side="right")
        block = blocks[tile] - np.rint((end[tile] - cuts) / block_seconds[tile]).astype(np.int64)
        # A short end of a tile is not worth a part of its own.
        least = np.maximum(cuts[0] / 8 / block_seconds[tile], 1)
        worth = (least <= block) & (block <= blocks[tile] - least)
        begin = np.concatenate([np.arange(len(blocks)) << 32, tile[worth] << 32 | block[worth]])
        begin.sort()
        begin = begin[np.append(True, begin[1:] > begin[:-1])]
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
