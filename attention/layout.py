"""What a step's query rows read, as arrays: KV page lists in, `WorkList` out. NumPy only.

Rows are put in tree order (depth first over the page lists), so that rows which share pages are neighbours,
and every run of pages shared by a run of rows becomes one work item: shared pages are read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int, Int32

# item_causal of an item that is seen whole by all of its rows.
WHOLE = 2**30


@dataclass(frozen=True, slots=True)
class Read:
    """What the consecutive query rows of one entry read.

    pages      page ids, root first; the segment being written comes last
    valid      filled positions of each page, as of after this step's writes: 1..page_size
    own_pages  how many of the last pages belong to the segment being written
    rows       query rows, at consecutive positions of that segment
    ordinal    index inside that segment of the first row; row i sees the segment's positions up to and
               including ordinal + i, and everything before the segment
    """

    pages: Sequence[int] | np.ndarray
    valid: Sequence[int] | np.ndarray
    own_pages: int
    rows: int
    ordinal: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Array sizes of the work lists of one row bucket."""

    rows: int
    items: int
    page_refs: int

    @classmethod
    def for_bucket(cls, rows: int, num_pages: int, pages_per_read: int | None = None) -> Capacity:
        """Room for every plan of at most `rows` rows.

        The items are the nodes of a tree with at most `rows` leaves in which every inner node branches, so
        2 * rows - 1 suffice. A pool page is referred to once, and once more by each read that sees only a
        part of it where others see more; `pages_per_read` (the longest context in pages) bounds small
        buckets further.
        """
        refs = num_pages + rows
        if pages_per_read is not None:
            refs = min(refs, rows * pages_per_read)
        return cls(rows=rows, items=2 * rows, page_refs=refs)

    def empty(self) -> WorkList:
        return WorkList(
            item_pages=np.zeros((self.items, 2), np.int32),
            item_rows=np.zeros((self.items, 2), np.int32),
            item_causal=np.zeros(self.items, np.int32),
            page_ids=np.zeros(self.page_refs, np.int32),
            page_valid=np.zeros(self.page_refs, np.int32),
            num_items=np.zeros((), np.int32),
            num_single=np.zeros((), np.int32),
        )


class WorkList(NamedTuple):
    """Work items of a step: int32 arrays, NumPy or JAX; a pytree. Entries past the counts are padding.

    The first `num_single` items have one row each, no two of them the same row, and are WHOLE; they are
    sorted by page count, longest first, so that neighbours can be processed in lockstep. The items from
    there to `num_items` are of any kind and in any order; a row may have any number of them.

    item_pages   first page reference, page reference count
    item_rows    first row, row count
    item_causal  row i of the item sees the first item_causal + i + 1 filled positions of the item's pages;
                 WHOLE: all of them
    page_ids     page of each reference
    page_valid   filled positions of that page; 0 where a list was laid out for pages yet to be filled
    """

    item_pages: Int32[Any, "items 2"]
    item_rows: Int32[Any, "items 2"]
    item_causal: Int32[Any, " items"]
    page_ids: Int32[Any, " page_refs"]
    page_valid: Int32[Any, " page_refs"]
    num_items: Int32[Any, ""]
    num_single: Int32[Any, ""]


def plan_rows(
    reads: Sequence[Read], capacity: Capacity, page_size: int
) -> tuple[Int[np.ndarray, " reads"], WorkList]:
    """Lay rows out in tree order and list the work: `order[i]` is the index of the read whose rows come i-th.

    Rows are packed without gaps in that order. Reads share a page if their page lists (ids and valid counts)
    agree from the root up to it, and all of their rows see all of it.

    Raises:
      ValueError: a read is malformed, or rows, items or page references exceed `capacity`.
    """
    work = capacity.empty()
    if not reads:
        return np.zeros(0, np.int64), work
    lists = PageLists.of(reads, page_size)
    order, shared = lists.tree_order()
    lists = lists.take(order)
    nodes = np.array(list(_tree_nodes(shared, lists.count)), np.int64)
    read, start, stop, last = nodes.T

    row_end = np.cumsum(lists.rows)
    first_row = row_end[read] - lists.rows[read]
    row_count = row_end[last] - first_row
    page_count = stop - start
    by_kind = np.lexsort((-page_count, row_count > 1))

    check_fits("rows", int(row_end[-1]), capacity.rows)
    check_fits("items", len(nodes), capacity.items)
    check_fits("page references", int(page_count.sum()), capacity.page_refs)
    items = slice(len(nodes))
    page_count = page_count[by_kind]
    work.item_pages[items, 0] = np.cumsum(page_count) - page_count
    work.item_pages[items, 1] = page_count
    work.item_rows[items, 0] = first_row[by_kind]
    work.item_rows[items, 1] = row_count[by_kind]
    work.item_causal[items] = lists.causal(read, start, stop)[by_kind]
    refs = ragged_ranges((lists.offset[read] + start)[by_kind], page_count)
    work.page_ids[: len(refs)] = lists.pages[refs]
    work.page_valid[: len(refs)] = lists.valid[refs]
    work.num_items[...] = len(nodes)
    work.num_single[...] = np.count_nonzero(row_count == 1)
    return order, work


@dataclass(frozen=True, slots=True)
class PageLists:
    """The reads' page lists end to end. Read r's are pages[offset[r]:][:count[r]].

    seen   positions of its list that the read's first row sees
    whole  leading pages that all of its rows see whole
    table  where `filled` has the positions before each of its pages, and after the last; only of reads of
           several rows, the others see all of their list whole
    """

    rows: np.ndarray
    offset: np.ndarray
    count: np.ndarray
    seen: np.ndarray
    whole: np.ndarray
    table: np.ndarray
    pages: np.ndarray
    valid: np.ndarray
    filled: np.ndarray

    @classmethod
    def of(cls, reads: Sequence[Read], page_size: int) -> PageLists:
        rows = np.fromiter([read.rows for read in reads], np.int64)
        own = np.fromiter([read.own_pages for read in reads], np.int64)
        ordinal = np.fromiter([read.ordinal for read in reads], np.int64)
        count = np.fromiter([len(read.pages) for read in reads], np.int64)
        if count.sum() != sum([len(read.valid) for read in reads]):
            raise ValueError("every page of a Read needs its valid count, and only those")
        if (own < 1).any() or (own > count).any() or (rows < 1).any() or (ordinal < 0).any():
            raise ValueError("a Read needs 1 <= own_pages <= len(pages), rows >= 1 and ordinal >= 0")
        pages = np.concatenate([read.pages for read in reads], dtype=np.int32)
        valid = np.concatenate([read.valid for read in reads], dtype=np.int32)
        if valid.min() < 1 or valid.max() > page_size or pages.min() < 0:
            raise ValueError(f"a Read's valid counts must be in 1..{page_size} and its page ids not negative")
        end = np.cumsum(count)
        offset = end - count
        filled_own = np.add.reduceat(valid, np.stack([end - own, end], 1).ravel()[:-1])[::2].astype(np.int64)
        if (ordinal + rows > filled_own).any():
            raise ValueError("a Read's last row must be inside its own pages' valid positions")
        seen = np.add.reduceat(valid, offset) - filled_own + ordinal + 1

        # Only where a row may see less than the list does it matter where each page's positions begin.
        whole, table = count.copy(), np.zeros_like(count)
        some = np.flatnonzero(ordinal + 1 < filled_own)
        table[some] = np.cumsum(count[some]) - count[some]
        filled = np.append(0, np.cumsum(valid[ragged_ranges(offset[some], count[some])], dtype=np.int64))
        start = filled[table[some]]
        whole[some] = np.searchsorted(filled, start + seen[some], side="right") - 1 - table[some]

        # A single row sees a fixed set of positions: cut its list there, and it is an ordinary whole read.
        single = rows[some] == 1
        some, start = some[single], start[single]
        rest = start + seen[some] - filled[table[some] + whole[some]]
        valid[(offset + whole)[some][rest > 0]] = rest[rest > 0]
        whole[some] += rest > 0
        count[some] = whole[some]
        return cls(rows, offset, count, seen, whole, table, pages, valid, filled)

    def tree_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Depth first over the shared pages, and how many of them each read shares with the one before it.

        Page lists are put in lexicographic order, as bytes. Only leading pages that are seen whole count.
        """
        width = 4 if self.pages.max() < 2**23 else 8
        nodes = self.pages.astype(f"i{width}") << 8 | self.valid
        nodes = nodes.astype(f">i{width}").tobytes()
        starts, stops = (width * self.offset).tolist(), (width * (self.offset + self.whole)).tolist()
        keys = [nodes[start:stop] for start, stop in zip(starts, stops, strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        overlaps = _overlaps([keys[read] for read in order], width)
        return np.fromiter(order, np.int64), np.fromiter(overlaps, np.int64)

    def take(self, order: np.ndarray) -> PageLists:
        return replace(
            self,
            rows=self.rows[order],
            offset=self.offset[order],
            count=self.count[order],
            seen=self.seen[order],
            whole=self.whole[order],
            table=self.table[order],
        )

    def positions_before(self, read: np.ndarray, page: np.ndarray) -> np.ndarray:
        """Positions before the page-th of a read of several rows."""
        return self.filled[self.table[read] + page] - self.filled[self.table[read]]

    def causal(self, read: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """`item_causal` of items that read the pages start..stop of the lists of `read`."""
        causal = np.full(len(read), WHOLE)
        cut = stop > self.whole[read]
        causal[cut] = self.seen[read[cut]] - 1 - self.positions_before(read[cut], start[cut])
        return causal


def _overlaps(keys: list[bytes], width: int) -> list[int]:
    """How many leading words of `width` bytes each key has in common with the one before it."""
    overlaps, depth, previous, common = [], 0, b"", b""
    for key in keys:
        # Mostly as many as the last two had.
        end = depth + width
        if not key.startswith(common) or key[depth:end] == previous[depth:end]:
            size = min(len(key), len(previous))
            differ = int.from_bytes(key[:size]) ^ int.from_bytes(previous[:size])
            depth = (size - (differ.bit_length() + 7) // 8) // width * width
            common = key[:depth]
        overlaps.append(depth // width)
        previous = key
    return overlaps


def _tree_nodes(shared: np.ndarray, count: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Nodes of the tree of page lists, given each list's overlap with the one before it.

    Yields (first read, start depth, stop depth, last read): the maximal run of reads that have the pages
    start..stop in common.
    """
    path: list[tuple[int, int]] = []  # open nodes, root first: (stop depth, first read)
    for read, (depth, own) in enumerate(
        zip(chain(shared.tolist(), [0]), chain(count.tolist(), [0]), strict=True)
    ):
        first = read
        while path and path[-1][0] > depth:
            stop, first = path.pop()
            yield first, max(depth, path[-1][0] if path else 0), stop, read - 1
        if depth and (not path or path[-1][0] < depth):
            path.append((depth, first))
        if own > depth:
            path.append((own, read))


def ragged_ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0] .. start[0] + count[0] - 1, start[1] .. and so on, end to end."""
    skipped = np.cumsum(count) - count
    return np.repeat(start - skipped, count) + np.arange(count.sum())


def check_fits(what: str, needed: int, room: int) -> None:
    if needed > room:
        raise ValueError(
            f"the step needs {needed} {what}, its bucket has room for {room}: take a larger bucket"
        )
