"""A step's work for the backends that read item by item: reads in, `WorkList` out. NumPy only.

Every run of pages shared by a run of rows becomes one work item: shared pages are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attention.reads import Reads, ReadTree, pairs, ragged_ranges

if TYPE_CHECKING:
    from jaxtyping import Int, Int32

# item_causal of an item that is seen whole by all of its rows.
WHOLE = 2**30


@dataclass(frozen=True, slots=True)
class ItemCapacity:
    """Array sizes of the work lists of one row bucket."""

    rows: int
    items: int
    page_refs: int
    page_size: int

    @classmethod
    def for_bucket(
        cls, rows: int, num_pages: int, page_size: int, pages_per_read: int | None = None, *, paths: int = 1
    ) -> ItemCapacity:
        """Room for every step of at most `rows` rows.

        The items are the nodes of a tree with at most `rows` leaves in which every inner node branches, so
        2 * rows - 1 suffice. A pool page is referred to once for each of the `paths` on which reads come to
        it (see `Sizes`), and once more by each read that sees only a part of it where others see more;
        `pages_per_read` (the longest context in pages) bounds small buckets further.
        """
        refs = min(paths, rows) * num_pages + rows
        if pages_per_read is not None:
            refs = min(refs, rows * pages_per_read)
        return cls(rows=rows, items=2 * rows, page_refs=refs, page_size=page_size)

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


def lay_out_items(reads: Reads, capacity: ItemCapacity) -> tuple[Int[np.ndarray, " reads"], WorkList]:
    """`attention.backend.Backend.lay_out_unpadded`: rows in tree order, an item for each run of pages shared.

    Reads share a page if their pages (ids and valid counts) agree
    from the root up to it, and all of their rows see all of it.
    """
    if not reads.own:
        return np.zeros(0, np.int64), capacity.empty()
    order, tree = ReadTree.of(reads, capacity.page_size)
    read, last, start, stop = _tree_nodes(tree.shared, tree.count)

    row_end = tree.rows.cumsum()
    first_row = row_end[read] - tree.rows[read]
    row_count = row_end[last] - first_row
    page_count = stop - start
    check_fits("rows", int(row_end[-1]), capacity.rows)
    check_fits("items", len(read), capacity.items)
    check_fits("page references", int(page_count.sum()), capacity.page_refs)

    by_kind = np.lexsort((-page_count, row_count > 1))
    read, start, stop, page_count = read[by_kind], start[by_kind], stop[by_kind], page_count[by_kind]
    refs = ragged_ranges(*tree.runs(read, start, stop))
    work = WorkList(
        item_pages=pairs(page_count.cumsum() - page_count, page_count),
        item_rows=pairs(first_row[by_kind], row_count[by_kind]),
        item_causal=_causal(tree, read, start, stop),
        page_ids=tree.pages[refs],
        page_valid=tree.valid[refs],
        num_items=np.array(len(read)),
        num_single=np.array(np.count_nonzero(row_count == 1)),
    )
    return order, WorkList(*(array.astype(np.int32, copy=False) for array in work))


def _tree_nodes(shared: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, ...]:
    """Nodes of the tree of reads, given each read's pages in common with the one before it.

    Returns (first read, last read, start depth, stop depth): maximal runs of reads that have the pages
    start..stop in common.
    """
    # A leaf is what a read has in common with neither neighbour.
    start = np.maximum(shared, np.append(shared[1:], 0))
    leaf = (start < count).nonzero()[0]
    change = np.append(0, (shared[1:] != shared[:-1]).nonzero()[0] + 1)
    inner = np.array(list(_inner_nodes(change.tolist(), shared[change].tolist(), len(shared))), np.int64)
    leaves = np.stack([leaf, leaf, start[leaf], count[leaf]])
    return tuple(np.concatenate([leaves, inner.reshape(-1, 4).T], axis=1))


def _inner_nodes(reads: list[int], depths: list[int], end: int) -> Iterator[tuple[int, int, int, int]]:
    """Nodes of several reads, as of `_tree_nodes`: from reads[i] on, reads share depths[i] with the last."""
    path: list[tuple[int, int]] = []  # open nodes, root first: (stop depth, first read)
    for read, depth in zip([*reads, end], [*depths, 0], strict=True):
        first = read - 1
        while path and path[-1][0] > depth:
            stop, first = path.pop()
            yield first, read - 1, max(depth, path[-1][0] if path else 0), stop
        if depth and (not path or path[-1][0] < depth):
            path.append((depth, first))


def _causal(tree: ReadTree, read: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """`item_causal` of items that read the pages start..stop of `read`."""
    causal = np.full(len(read), WHOLE)
    cut = (stop > tree.whole[read]).nonzero()[0]
    if len(cut):
        read, start = read[cut], start[cut]
        first, count = tree.runs(read, start, tree.depth[read])
        context = [tree.valid[a : a + n].sum() for (a, _), (n, _) in zip(first, count, strict=True)]
        causal[cut] = tree.causal(read, np.maximum(start, tree.depth[read])) + np.array(context)
    return causal


def check_fits(what: str, needed: int, room: int) -> None:
    if needed > room:
        raise ValueError(
            f"the step needs {needed} {what}, its bucket has room for {room}: take a larger bucket"
        )


def padded(work: Any, empty: Any) -> Any:
    """`empty`, with the arrays of `work` at the beginning of its arrays."""
    for array, room in zip(work, empty, strict=True):
        room[tuple(map(slice, array.shape))] = array
    return empty
