"""Which tiles are split into parts, so that all of the device has work, by predicted cost. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attention.reads import ragged_ranges
from attention.tile_reads import Tiles
from attention.tiles import NO_LIMIT, TileCapacity, TileList, Tiling, pack_sees, unpack_sees

MOST_PIECES = 16  # of a tall tile
CLOSE = 1.2  # tiles, or parts, this near to an even load are rarely bettered: not worth planning more splits


@dataclass(frozen=True, slots=True)
class Parts:
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
    def unsplit(cls, tiles: Tiles, tiling: Tiling) -> Parts:
        every = np.arange(len(tiles.row))
        nothing = np.zeros_like(every)
        return cls._of(every, tiles.row, tiles.row_end, tiles.whole, tiles.masked, nothing, tiling)

    @classmethod
    def split(cls, tiles: Tiles, tile: np.ndarray, block: np.ndarray, tiling: Tiling) -> Parts:
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
    ) -> Parts:
        blocks = _blocks(whole, tiling.block_pages) + _blocks(masked, tiling.block_pages)
        seconds = tiling.tile_seconds(row_end - row, blocks)
        return cls(tile, row, row_end, whole, masked, blocks, slots, seconds)

    def predict(self, tiling: Tiling, which: np.ndarray | slice = slice(None)) -> tuple[float, float]:
        """Seconds that the parts take together, and that they would take if the load were even."""
        workers, seconds = tiling.head_workers, self.seconds[which]
        mean = (seconds.sum() + tiling.partial_row_seconds * self.slots[which].sum()) / workers
        if len(seconds) <= workers:
            return mean + tiling.costs.alone * max(0.0, seconds.max() - mean), mean
        # Longest first, as many at a time as there are workers, and the longest to whoever has least.
        rounds = -(-len(seconds) // workers)
        ranked = np.zeros(rounds * workers)
        ranked[len(ranked) - len(seconds) :] = seconds
        ranked.sort()
        load = ranked[-workers:]
        for begin in range(len(ranked) - 2 * workers, -1, -workers):
            load.sort()
            load = load[::-1] + ranked[begin : begin + workers]
        longest = max(mean, load.max())
        # Who is left at the end has more of the memory's bandwidth.
        return mean + tiling.costs.alone * (longest - mean), mean

    def listed(self, tiles: Tiles, tiling: Tiling) -> TileList:
        """As the kernels read them."""
        order = np.argsort(-self.seconds, kind="stable")
        if tiling.tall_rows:
            order = order[np.argsort((self.row_end - self.row)[order] <= tiling.wide_rows, kind="stable")]
        slots, row = self.slots[order], self.row[order]
        count, rows, refs = len(order), int(tiles.row_end[-1]), tiles.page_ids
        ranges = np.empty((3, count, 2), np.int32)
        ranges[0, :, 0] = row
        ranges[0, :, 1] = self.row_end[order] - row
        ranges[1:, :, 0] = self.whole[order, 0], self.masked[order, 0]
        ranges[1:, :, 1] = self.whole[order, 1], self.masked[order, 1]
        ranges[1:, :, 1] -= ranges[1:, :, 0]

        tile_part, part_slots = np.full(count, -1, np.int32), np.zeros(0, np.int32)
        row_parts = np.zeros((rows, 2), np.int32)
        if slots.any():
            tile_part = np.where(slots > 0, np.cumsum(slots) - slots, -1).astype(np.int32)
            slot_row = ragged_ranges(row, slots)
            part_slots = np.empty(len(slot_row), np.int32)
            part_slots[np.argsort(slot_row, kind="stable")] = np.arange(len(slot_row))
            parts = np.bincount(slot_row, minlength=rows)
            row_parts[:, 0] = np.cumsum(parts) - parts
            row_parts[:, 1] = parts
        row_parts[row_parts[:, 1] == 0, 1] = -1

        sees = np.zeros(len(refs), np.int32)
        sees[tiles.masked[0, 0] :] = self._sees(tiles)
        return TileList(
            *ranges,
            tile_part=tile_part,
            page_ids=refs,
            page_sees=sees,
            row_parts=row_parts,
            part_slots=part_slots,
            num_tiles=np.array(count, np.int32),
        )

    def _sees(self, tiles: Tiles) -> np.ndarray:
        """Who sees a page is told from the first row of the part, which may not be the tile's."""
        skipped = self.row - tiles.row[self.tile]
        if not skipped.any():
            return tiles.sees
        skipped = skipped.repeat(self.masked[:, 1] - self.masked[:, 0])
        valid, first, end, causal = unpack_sees(tiles.sees)
        causal = np.minimum(causal + skipped, NO_LIMIT)
        return pack_sees(valid, first - skipped, end - skipped, causal)


def split_tiles(tiles: Tiles, capacity: TileCapacity) -> Parts:
    """The tiles as they are, or cut for an even load where that is predicted to be faster.

    To cut, the tiles are laid end to end and the line is divided evenly among all or some of the workers.
    Tall tiles have workers of their own: see `_tall_begins`.
    """
    tiling = capacity.tiling
    best = whole = Parts.unsplit(tiles, tiling)
    begins, others = np.arange(len(whole.blocks)) << 32, slice(None)
    tall = tiles.row_end - tiles.row > tiling.wide_rows
    if tall.any():
        begins = np.concatenate([begins, _tall_begins(whole, tall.nonzero()[0], tiling)])
        best, others = _cut(tiles, begins, tiling), (~tall).nonzero()[0]
        if not len(others):
            return best
    seconds, mean = whole.predict(tiling, others)
    if seconds < CLOSE * mean:
        return best
    block_seconds = tiling.block_seconds(tiles.row_end - tiles.row)
    blocks, end, previous = whole.blocks, np.cumsum(whole.seconds[others]), np.inf
    for share in (1, 2, 4, 8):
        workers = tiling.head_workers // share
        if workers < 2 or seconds < CLOSE * mean:
            break
        cuts = np.arange(1, workers) * end[-1] / workers
        at = np.searchsorted(end, cuts, side="right")
        tile = np.arange(len(blocks))[others][at]
        block = blocks[tile] - np.rint((end[at] - cuts) / block_seconds[tile]).astype(np.int64)
        # A short end of a tile is not worth a part of its own.
        least = np.maximum(cuts[0] / 8 / block_seconds[tile], 1)
        worth = (least <= block) & (block <= blocks[tile] - least)
        parts = _cut(tiles, np.concatenate([begins, tile[worth] << 32 | block[worth]]), tiling)
        if len(parts.tile) > capacity.tiles or parts.slots.sum() > capacity.slots:
            continue
        predicted, _ = parts.predict(tiling, others if isinstance(others, slice) else ~tall[parts.tile])
        if predicted < seconds:
            best, seconds = parts, predicted
        elif predicted > previous:
            break
        previous = predicted
    return best


def _cut(tiles: Tiles, begins: np.ndarray, tiling: Tiling) -> Parts:
    """Parts that begin where `begins` says: a tile's index << 32 | a block of it."""
    begins = np.sort(begins)
    begins = begins[np.append(True, begins[1:] > begins[:-1])]
    return Parts.split(tiles, begins >> 32, begins & 0xFFFFFFFF, tiling)


def _tall_begins(whole: Parts, tall: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Where parts of the tall tiles begin: pieces of nearly equal length, as many as make the load even.

    These tiles are few and alike, so that parts of one length fill the device in whole rounds.
    """
    blocks, rows = whole.blocks[tall], (whole.row_end - whole.row)[tall]
    block_seconds, best, chosen = float(tiling.block_seconds(rows).max()), np.inf, np.ones_like(blocks)
    for pieces in range(1, MOST_PIECES + 1):
        length = -(-int(blocks.max()) // pieces)
        count = -(-blocks // length)
        rounds = -(-int(count.sum()) // tiling.tall_head_workers)
        partial = tiling.partial_row_seconds * float((rows * count)[count > 1].sum()) / tiling.head_workers
        seconds = rounds * (tiling.costs.tile + length * block_seconds) + partial
        if count[count > 1].sum() <= tiling.most_tall_parts and seconds < best:
            best, chosen = seconds, count
    tile, piece = tall.repeat(chosen), ragged_ranges(np.zeros_like(chosen), chosen)
    return tile << 32 | piece * blocks.repeat(chosen) // chosen.repeat(chosen)


def _blocks(refs: np.ndarray, block_pages: int) -> np.ndarray:
    """Blocks of references in the ranges [first, end)."""
    return -((refs[:, 0] - refs[:, 1]) // block_pages)
