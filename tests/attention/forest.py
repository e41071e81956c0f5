"""Random trees of KV segments, the reads of their leaves, and the positions that those reads must see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from hypothesis import strategies as st

from attention.layout import WorkList
from attention.reads import AnyPageRun, PageRun, Read

SYSTEM_PAGES = 3  # full pages of a prompt that requests share through a prefix cache


def filled(segments: Iterable[AnyPageRun], page_size: int) -> Iterator[tuple[int, int]]:
    """(page, filled positions) of the segments' pages, end to end."""
    for segment in segments:
        for index, page in enumerate(segment.pages):
            yield page, min(page_size, segment.length - index * page_size)


def pages_of(read: Read) -> list[int]:
    """The read's pages, root first."""
    return [page for segment in (*read.context, read.own) for page in segment.pages]


@dataclass
class Forest:
    """Hands out scattered pages, never one twice (but for the system prompt's)."""

    page_size: int
    stride: int  # odd, so that it visits every page of a power of two
    num_pages: int = 4096
    leaves: list[tuple[tuple[PageRun, ...], PageRun, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [(self.stride * i) % self.num_pages for i in range(self.num_pages)]
        self.system = tuple(self.free.pop() for _ in range(SYSTEM_PAGES))

    def segment(self, length: int, cached: int = 0) -> PageRun:
        count = -(-length // self.page_size)
        return PageRun(self.system[:cached] + tuple(self.free.pop() for _ in range(count - cached)), length)

    def first(self, segment: PageRun, length: int) -> PageRun:
        """The first `length` positions of a segment."""
        return PageRun(segment.pages[: -(-length // self.page_size)], length)

    @cached_property
    def reads(self) -> list[Read]:
        """Made here and not in the strategy: beartype checks a Read with the global random generator."""
        return [Read(context, own, rows, own.length - rows) for context, own, rows in self.leaves]


@st.composite
def forests(draw: st.DrawFn, page_sizes: tuple[int, ...] = (1, 2, 4), aliased: bool = False) -> Forest:
    """One to four requests: nested forks, kv joins, decode rows beside prompt chunks, shared prompts.

    Contexts may be equal without being the same object, and hold segments without pages. `aliased`: some
    segments are read under a second name, at another length or in another place of a tree.
    """
    forest = Forest(
        page_size=draw(st.sampled_from(page_sizes)),
        stride=2 * draw(st.integers(0, 2047)) + 1,
    )
    lengths = st.integers(0, 5 * forest.page_size)

    def leaf(context: tuple[PageRun, ...], cached: int = 0) -> None:
        rows = draw(st.sampled_from([1, 1, 2, 3, 7]))
        before = draw(st.integers(0, 4 * forest.page_size)) + cached * forest.page_size
        forest.leaves.append((context, forest.segment(before + rows, cached), rows))

    def grow(context: tuple[PageRun, ...], depth: int) -> None:
        match draw(st.sampled_from(["leaf", "fork", "join"])) if depth < 3 else "leaf":
            case "leaf":
                leaf(context if draw(st.booleans()) else (*context,))
            case "fork":
                for _ in range(draw(st.integers(1, 3))):
                    step = (forest.segment(draw(lengths)),) if draw(st.booleans()) else ()
                    grow(context + step, depth + 1)
            case "join":
                joined = tuple(forest.segment(draw(lengths)) for _ in range(draw(st.integers(1, 3))))
                grow(context + joined, depth + 1)

    for _ in range(draw(st.integers(1, 4))):
        cached = draw(st.integers(0, SYSTEM_PAGES))
        if draw(st.booleans()):
            leaf((), cached)
        else:
            length = cached * forest.page_size + draw(lengths)
            grow((forest.segment(length, cached),), 0)
    for context, own, rows in forest.leaves.copy() if aliased else ():
        match draw(st.sampled_from(["no", "no", "same", "shorter", "sealed", "moved"])):
            case "same":
                forest.leaves.append(((*context,), PageRun(own.pages, own.length), rows))
            case "shorter":
                length = draw(st.integers(1, own.length))
                forest.leaves.append((context, forest.first(own, length), min(rows, length)))
            case "sealed":  # in the very step in which others begin to read it
                leaf((*context, own))
            case "moved":
                forest.leaves.append((context[1:], own, rows))
    forest.leaves = draw(st.permutations(forest.leaves))
    return forest


def positions_seen(read: Read, row: int, page_size: int) -> list[tuple[int, int]]:
    """(page, slot) of every position that a row of the read attends to, root first."""
    before, own = (
        [(page, slot) for page, count in filled(segments, page_size) for slot in range(count)]
        for segments in (read.context, [read.own])
    )
    return before + own[: read.ordinal + row + 1]


def positions_listed(work: WorkList) -> Iterator[tuple[int, tuple[int, int]]]:
    """(row, (page, slot)) of every position that the work list's items give to their rows."""
    for item in range(work.num_items):
        first_ref, refs = work.item_pages[item].tolist()
        first_row, rows = work.item_rows[item].tolist()
        listed = [
            (int(work.page_ids[ref]), slot)
            for ref in range(first_ref, first_ref + refs)
            for slot in range(work.page_valid[ref])
        ]
        for row in range(rows):
            for position in listed[: work.item_causal[item] + row + 1]:
                yield first_row + row, position


def readers_of_shared_pages(reads: list[Read], page_size: int) -> Counter[frozenset[int]]:
    """For every page of the tree, who reads it: how many pages each set of reads has to itself.

    A page is a node of the tree (its path matters, not only its id) if all rows of a read see all of it;
    the remaining pages of a read are its own.
    """
    readers: dict[tuple, set[int]] = {}
    for index, read in enumerate(reads):
        seen, path = len(positions_seen(read, 0, page_size)), ()
        for page, valid in filled((*read.context, read.own), page_size):
            path = (*path, (page, valid, index if seen < valid else None))
            readers.setdefault(path, set()).add(index)
            seen -= valid
    return Counter(frozenset(group) for group in readers.values())


def groups_of_branches(groups: int, width: int, prefix: int, tails: list[int], page_size: int) -> list[Read]:
    """Decode rows of `groups` requests with `width` branches each; a branch reads at least its own row."""
    pages = groups * (prefix // page_size + 1 + width * (max(tails) // page_size + 1)) + SYSTEM_PAGES
    forest = Forest(page_size=page_size, stride=1237, num_pages=1 << pages.bit_length())
    for group in range(groups):
        trunk = (forest.segment(prefix),) if prefix else ()
        for branch in range(width):
            tail = tails[(group * width + branch) % len(tails)]
            # A branch that has nothing of its own yet decodes the prefix's last token.
            context, own = (trunk, forest.segment(tail)) if tail or not prefix else ((), trunk[0])
            forest.leaves.append((context, own, 1))
    return forest.reads


def mixed_reads(page_size: int) -> list[Read]:
    """One step of everything: a three-level tree, a wide fork, prompt chunks, a kv join, a lone long tail.

    It crosses the tiles and blocks of `attention.xla`: more than 16 rows share pages, more than 128 positions
    are read; and there are contexts of a single position.
    """
    forest = Forest(page_size=page_size, stride=2053)

    def leaf(context: tuple[PageRun, ...], length: int, rows: int = 1, cached: int = 0) -> None:
        forest.leaves.append((context, forest.segment(length, cached), rows))

    trunk = forest.segment(150)
    for middle in (1, 33, 40):
        child = forest.segment(middle)
        leaf((trunk, child), middle)
        leaf((trunk, child), 2)
    wide = forest.segment(137)
    for branch in range(20):
        leaf((wide,), 1 + 7 * branch % 30)
    joined = (wide, forest.segment(5), forest.segment(2 * page_size), forest.segment(9))
    leaf(joined, 6)
    leaf((*joined, forest.segment(3)), 17, rows=11)
    leaf((), 37, rows=37)
    leaf((), 290, rows=21)
    leaf((), 3 * page_size + 40, rows=18, cached=SYSTEM_PAGES)
    leaf((), 3 * page_size + 5, cached=SYSTEM_PAGES)
    leaf((), 300)
    leaf((), 1)
    return forest.reads
