"""What each of a step's tiles reads: lists of pages, and who sees what of them. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attention.reads import ReadTree, pairs, ragged_ranges
from attention.tile_cuts import run_sizes
from attention.tiles import NO_LIMIT, Tiling, pack_sees


@dataclass(frozen=True, slots=True)
class Tiles:
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

    # A worked example: pages of 4 positions, a prefix of two pages, and three branches of one row each.
    #
    #     read   its pages, and how many positions are filled          what the tile lists
    #     0      5:4  6:4 | 9:3                                        whole   5  6
    #     1      5:4  6:4 | 2:4  8:1                                   masked  9      2      8      4
    #     2      5:4  6:4 | 4:2                                          valid 3      4      1      2
    #            common = 2                                              rows  0..1   1..2   1..2   2..3
    #
    # Pages 5 and 6 are read once, for all three rows and without a mask. Of the others, each says which rows
    # see it: the row of the read that brings it. Had page 6 only 3 positions, it would be common and yet not
    # full, and stand among the masked ones, seen by rows 0..3. A kernel that reads blocks of two pages would
    # find 5 and 6 in one block, and 9 2 | 8 4 in two more; with a prefix of one page, 5 would fill half a
    # block, so it joins the masked ones if their last block has room for it.

    @classmethod
    def of(cls, reads: ReadTree, first: np.ndarray, tiling: Tiling) -> Tiles:
        """Tiles that begin with the reads `first`."""
        size = run_sizes(first, len(reads.rows))
        tile_rows = np.add.reduceat(reads.rows, first)
        tile_end = tile_rows.cumsum()
        tile_row = tile_end - tile_rows

        # Leading pages of the tiles' reads that all of their rows see whole.
        depth = reads.shared.copy()
        depth[first] = (
            np.minimum(reads.whole, reads.leading_full)[first] if tiling.alone else reads.whole[first]
        )
        depth[first] = common = np.minimum.reduceat(depth, first)
        head = _Common.of(reads, first, common, tiling.page_size)

        # The other pages are masked, and full ones that would leave a block unfilled where these have room.
        masked = head.not_full + np.add.reduceat(reads.count - depth, first)
        spare = _spare(head.full, masked, tiling.block_pages)
        full, masked = head.full - spare, masked + spare
        refs, sizes = head.masked_refs(reads, first, depth, full, spare)

        row_end = reads.rows.cumsum() - tile_row.repeat(size)
        row = row_end - reads.rows
        sees = np.empty((len(row), 3), np.int32)
        sees.T[:] = pack_sees(0, row, row_end)
        sees[first, 0] = pack_sees(0, 0, tile_rows)
        sees = sees.ravel().repeat(sizes.ravel())
        sees |= reads.valid[refs]
        cls._unusual(reads, first, depth, row, row_end, sizes, refs, sees)

        end = len(head.listed) + masked.cumsum()
        return cls(
            tile_row,
            tile_end,
            pairs(head.whole, head.whole + full),
            pairs(end - masked, end),
            reads.pages[np.concatenate([head.listed, refs])],
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
        later = np.zeros(len(depth), np.int64)
        later[:-1] = reads.shared[1:]
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


@dataclass(frozen=True, slots=True)
class _Common:
    """The leading pages that all rows of a tile see whole: of each tile, unless `listed` says otherwise.

    whole     where its full ones begin in `listed`; full, their number
    not_full  the number of the others; partial, partials, their ranges in the reads' partial ones: [tiles, 2]
    listed    where the reads' pages have the full ones, tile after tile; tiles may share a range of it
    """

    whole: np.ndarray
    full: np.ndarray
    not_full: np.ndarray
    partial: np.ndarray
    partials: np.ndarray
    listed: np.ndarray

    @classmethod
    def of(cls, reads: ReadTree, first: np.ndarray, common: np.ndarray, page_size: int) -> _Common:
        """The first common[t] pages of read first[t]."""
        run, run_size = reads.runs(first, 0, common)
        partial = reads.partial.searchsorted(run)
        partials = reads.partial.searchsorted(run + run_size) - partial
        not_full = partials[:, 0] + partials[:, 1]
        full = common - not_full
        leader = _leaders(common, reads.shared[first])
        own = (leader == np.arange(len(leader))).nonzero()[0]
        end = full[own].cumsum()
        whole = (end - full[own])[own.searchsorted(leader)]
        listed = ragged_ranges(run[own], run_size[own])
        if not_full.any():
            listed = listed[reads.valid[listed] == page_size]
        return cls(whole, full, not_full, partial, partials, listed)

    def masked_refs(
        self, reads: ReadTree, first: np.ndarray, depth: np.ndarray, full: np.ndarray, spare: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each read, the pages that it brings; before a tile's first, what all of its rows see.

        These are its partial common pages, and the `spare` full ones after its first `full`. Returns where
        the reads' pages have them, and how many there are of each kind: [reads, 3].
        """
        refs, sizes = np.zeros((2, len(reads.rows), 3), np.int64)
        refs[:, 1:], sizes[:, 1:] = reads.runs(slice(None), depth, reads.count)
        sizes[first, 0] = of_all = spare + self.not_full
        refs = ragged_ranges(refs, sizes)
        if of_all.any():
            lists = np.concatenate([reads.partial, self.listed])
            begin = np.empty((len(of_all), 3), np.int64)
            begin[:, 0] = len(reads.partial) + self.whole + full
            begin[:, 1:] = self.partial
            at = ragged_ranges(sizes.ravel().cumsum()[3 * first] - of_all, of_all)
            count = np.empty_like(begin)
            count[:, 0] = spare
            count[:, 1:] = self.partials
            refs[at] = lists[ragged_ranges(begin, count)]
        return refs, sizes


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
        return np.zeros(len(full), np.int64)
    spare = full % block
    return spare * ((masked + spare - 1) // block == (masked - 1) // block)
