"""The forests that accuracy is checked on: groups with tails, and random trees with prompt chunks.

What a forest's rows must see is written down here as dense tables, straight from the lengths, so that the
check does not lean on any planner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attention import PageRun, Read

RAGGED = 300  # a matrix's tail of this length stands for lengths from 1 to it
LARGE_LOGITS = 16.0  # factor on the queries, exact in bfloat16: logits up to about 60


@dataclass(frozen=True, slots=True)
class Matrix:
    """Every combination of these is a case; lengths in tokens."""

    groups: Sequence[int] = (1, 2, 3, 8)
    width: Sequence[int] = (1, 2, 5, 16, 33, 128)
    prefix: Sequence[int] = (0, 1, 15, 16, 17, 511, 4096)
    tail: Sequence[int] = (0, 1, 16, 37, RAGGED)
    group_size: Sequence[int] = (1, 2, 5, 8)
    page: Sequence[int] = (16, 64)
    head_dim: Sequence[int] = (64, 128)
    narrow: int = 16  # widths up to this have a program of their own
    mixed: int = 40  # random trees per program
    kv_heads: int = 2

    def configurations(self) -> Iterator[tuple[int, int, int]]:
        """(group size, page, head size)"""
        return itertools.product(self.group_size, self.page, self.head_dim)

    def lengths(self) -> Iterator[tuple[int, int, int, int]]:
        """(groups, width, prefix, tail)"""
        return itertools.product(self.groups, self.width, self.prefix, self.tail)


SMALL = Matrix(
    groups=(1, 3),
    width=(1, 2, 5),
    prefix=(0, 1, 16, 37),
    tail=(0, 1, 16, 40),
    group_size=(5,),
    page=(16,),
    head_dim=(64,),
    narrow=2,
    mixed=10,
)


@dataclass(frozen=True, slots=True)
class Grid:
    """Array sizes of a dense forest: `groups` x `width` rows, pages of prefixes and of tails."""

    groups: int
    width: int
    prefix_pages: int
    tail_pages: int
    page: int

    @classmethod
    def of(cls, matrix: Matrix, page: int, *, narrow: bool) -> Grid:
        widths = [width for width in matrix.width if (width <= matrix.narrow) == narrow]
        return cls(
            groups=max(matrix.groups),
            width=max(widths),
            prefix_pages=max(1, -(-max(matrix.prefix) // page)),
            tail_pages=max(1, -(-max(matrix.tail) // page)),
            page=page,
        )

    @property
    def rows(self) -> int:
        return self.groups * self.width

    @property
    def pool_pages(self) -> int:
        return self.groups * self.prefix_pages + self.rows * self.tail_pages + 1

    @property
    def pages_per_read(self) -> int:
        return self.prefix_pages + self.tail_pages


@dataclass(frozen=True, slots=True)
class Forest:
    """One case in the arrays of a Grid.

    rows           [reads] group * width + branch of each read
    prefix_ids     [groups, prefix_pages] page ids; padded with the pool's last page, which nothing fills
    tail_ids       [groups * width, tail_pages]
    prefix_length  tokens
    tail_length    [groups * width] tokens
    """

    reads: list[Read]
    rows: np.ndarray
    prefix_ids: np.ndarray
    tail_ids: np.ndarray
    prefix_length: int
    tail_length: np.ndarray

    @classmethod
    def of(cls, grid: Grid, groups: int, width: int, prefix: int, tail: int, seed: int) -> Forest:
        """Pages in random order; every second forest of several groups or branches shares more than prefixes.

        Then groups begin with the same pages (a common system prompt), or rows have the same tail pages.
        """
        rng = np.random.default_rng(seed)
        row = np.arange(grid.rows)
        used = (row // grid.width < groups) & (row % grid.width < width)
        lengths = rng.integers(1, tail + 1, grid.rows) if tail == RAGGED else tail
        tail_length = np.where(used, lengths, 0)
        prefix_length = np.where(np.arange(grid.groups) < groups, prefix, 0)

        nothing = grid.pool_pages - 1
        prefix_ids = np.full((grid.groups, grid.prefix_pages), nothing, np.int32)
        tail_ids = np.full((grid.rows, grid.tail_pages), nothing, np.int32)
        in_prefix = np.arange(grid.prefix_pages) < -(-prefix_length // grid.page)[:, None]
        in_tail = np.arange(grid.tail_pages) < -(-tail_length // grid.page)[:, None]
        free = rng.permutation(nothing)
        prefix_ids[in_prefix], free = np.split(free[: in_prefix.sum() + in_tail.sum()], [in_prefix.sum()])
        tail_ids[in_tail] = free

        if seed % 4 == 1:
            common = rng.integers(0, prefix // grid.page + 1)
            prefix_ids[:groups, :common] = prefix_ids[0, :common]
        if seed % 4 == 2:
            source, *others = rng.permutation(np.flatnonzero(used))[: 1 + used.sum() // 2]
            tail_ids[others], tail_length[others] = tail_ids[source], tail_length[source]
        rows = np.flatnonzero(used & (prefix + tail_length > 0))
        forest = cls([], rows, prefix_ids, tail_ids, prefix, tail_length)
        forest.reads.extend(forest._reads(grid))
        return forest

    def _reads(self, grid: Grid) -> Iterator[Read]:
        """One for each row that reads anything; without a tail, the prefix is its own."""
        prefix_pages = -(-self.prefix_length // grid.page)
        prefixes = [PageRun(ids[:prefix_pages], self.prefix_length) for ids in self.prefix_ids]
        contexts = [(prefix,) if prefix_pages else () for prefix in prefixes]
        for row in self.rows.tolist():
            group, length = row // grid.width, int(self.tail_length[row])
            own = PageRun(self.tail_ids[row, : -(-length // grid.page)], length)
            context = contexts[group]
            if not length:
                context, own = (), prefixes[group]
            yield Read(context, own, rows=1, ordinal=own.length - 1)


@dataclass(frozen=True, slots=True)
class Tree:
    """Random requests that fork twice, decode rows beside prompt chunks.

    counts  [rows, pool positions] how often a row sees each position of the pool
    """

    ROWS = 256
    POSITIONS = 8192

    reads: list[Read]
    counts: np.ndarray

    @classmethod
    def of(cls, page: int, seed: int) -> Tree:
        rng = np.random.default_rng(seed)
        free = list(rng.permutation(cls.POSITIONS // page))
        reads: list[Read] = []

        def grow(context: tuple[PageRun, ...], depth: int) -> None:
            rows = int(rng.integers(2, 50)) if rng.random() < 0.15 else 1
            length = rows + int(rng.integers(0, 3 * page))
            own = PageRun([int(free.pop()) for _ in range(-(-length // page))], length)
            leaf = Read(context, own, rows, length - rows)
            if depth == 0 or rng.random() < 0.2:
                reads.append(leaf)
                return
            for _ in range(int(rng.integers(1, 5))):
                grow((*context, own), depth - 1)

        while len(free) > 40 * (2 + 48 // page) and len(reads) < 24:
            grow((), int(rng.integers(0, 3)))
        while sum(read.rows for read in reads) > cls.ROWS:
            reads.pop()
        return cls(reads, cls._counts(reads, page))

    @classmethod
    def _counts(cls, reads: Sequence[Read], page: int) -> np.ndarray:
        counts = np.zeros((cls.ROWS, cls.POSITIONS), np.int8)
        row = 0
        for read in reads:
            before, own = (
                [
                    number * page + offset
                    for segment in segments
                    for position, number in enumerate(segment.pages)
                    for offset in range(min(page, segment.length - position * page))
                ]
                for segments in (read.context, [read.own])
            )
            for index in range(read.rows):
                np.add.at(counts[row], before + own[: read.ordinal + index + 1], 1)
                row += 1
        return counts
