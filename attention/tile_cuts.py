"""Where a step's rows are cut into tiles, by predicted cost. NumPy only."""

from __future__ import annotations

from collections import deque

import numpy as np

from attention.reads import ReadTree
from attention.tiles import Tiling


def cut(reads: ReadTree, tiling: Tiling) -> np.ndarray:
    """The first read of every tile, by predicted cost.

    A wide tile reads what its rows share once, but takes longer than narrow ones for every page. So rows go
    into wide tiles where they share much beside what they have alone, and into narrow ones where they do not.
    A read of more rows than a wide tile has is a tile by itself.
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
    joins &= rows <= tiling.wide_rows
    first = _pack(reads, _with_previous(joins), again, tiling.wide_rows)

    # A tile stays if what narrow ones would read again costs more than what a wide one takes longer.
    start = first.nonzero()[0]
    size = run_sizes(start, len(rows))
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


def cut_least(reads: ReadTree, tiling: Tiling) -> np.ndarray:
    """The first read of every tile so that page references are few: all that share are together."""
    cost = tiling.page_size * reads.shared + 1.0
    together = _with_previous(reads.rows <= tiling.wide_rows)
    return _pack(reads, together, cost, tiling.wide_rows).nonzero()[0]


def _pack(reads: ReadTree, link: np.ndarray, cost: np.ndarray, most_rows: int) -> np.ndarray:
    """Is a read the first of its tile? Linked neighbours share a tile where they share pages.

    Runs of more than most_rows rows are cut, before read i at cost[i], as cheaply as that can be done.
    """
    first = ~(link & (reads.shared > 0))
    start = first.nonzero()[0]
    size = run_sizes(start, len(first))
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
        cuts = cheapest_cuts(start_row.tolist(), end_row.tolist(), cost[inside].tolist(), most_rows)
        first[start[run] + np.array(cuts)] = True
    return first


def cheapest_cuts(start: list[int], end: list[int], cost: list[float], most_rows: int) -> list[int]:
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
    both = np.zeros(len(flags), bool)
    np.logical_and(flags[1:], flags[:-1], out=both[1:])
    return both


def run_sizes(start: np.ndarray, end: int) -> np.ndarray:
    """Sizes of the runs that begin at `start`, of which the last stops at `end`."""
    sizes = np.empty_like(start)
    np.subtract(start[1:], start[:-1], out=sizes[:-1])
    sizes[-1] = end - start[-1]
    return sizes
