"""What a step's query rows read: runs of KV pages in, arrays in tree order out. NumPy only.

Tree order is depth first over the pages, so rows that share pages are neighbours. It mostly follows from the
segments: reads with the same context share all of it, and siblings' own pages differ from the first one on.
Pages are compared one by one only where two runs begin with the same page, as requests with one system prompt
in the prefix cache do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int


@runtime_checkable
class AnyPageRun(Protocol):
    """A KV segment as rows read it: pages, all of them full but the last.

    pages   page ids, as few as hold `length` positions. An array of int32 (NumPy's, or array.array's "i") is
            read at once, any other sequence one by one
    length  filled positions, as of after this step's writes
    """

    @property
    def pages(self) -> Any: ...
    @property
    def length(self) -> int: ...


class PageRun(NamedTuple):
    """An AnyPageRun."""

    pages: Sequence[int] | np.ndarray
    length: int


class Read(NamedTuple):
    """What consecutive query rows of one segment read.

    context  the segment's ancestors, root first; they are read whole. Where reads have the very same object,
             it costs nothing to find that they share it
    own      the segment itself, up to and including the last row: ordinal + rows positions
    rows     query rows
    ordinal  index inside `own` of the first row; row i sees its positions up to and including ordinal + i
    """

    context: Sequence[AnyPageRun]
    own: AnyPageRun
    rows: int
    ordinal: int


class Reads(NamedTuple):
    """The reads of a step, by column: hundreds of Reads take longer to make than to plan."""

    context: Sequence[Sequence[AnyPageRun]]
    own: Sequence[AnyPageRun]
    rows: Sequence[int] | np.ndarray
    ordinal: Sequence[int] | np.ndarray

    @classmethod
    def of(cls, reads: Iterable[Read]) -> Reads:
        return cls(*zip(*reads, strict=True)) if reads else cls((), (), (), ())


@dataclass(frozen=True, slots=True)
class ReadTree:
    """Reads in tree order. Page d of a read is pages[context + d] if d < depth, else pages[own + d - depth].

    rows     query rows; they are packed in this order without gaps
    end      filled positions of its own pages
    ordinal  index among them of the first row
    context  where `pages` has the context's
    depth    how many the context has
    own      where `pages` has its own
    count    its pages, context and own
    whole    leading pages that all of its rows see whole
    shared   leading pages in common with the read before it, which all rows of both see whole
    pages    page ids of all the runs, end to end
    valid    filled positions of those pages
    partial  where `valid` is less than a page, ascending
    """

    page_size: int
    rows: Int[np.ndarray, " reads"]
    end: Int[np.ndarray, " reads"]
    ordinal: Int[np.ndarray, " reads"]
    context: Int[np.ndarray, " reads"]
    depth: Int[np.ndarray, " reads"]
    own: Int[np.ndarray, " reads"]
    count: Int[np.ndarray, " reads"]
    whole: Int[np.ndarray, " reads"]
    shared: Int[np.ndarray, " reads"]
    pages: Int[np.ndarray, " pages"]
    valid: Int[np.ndarray, " pages"]
    partial: Int[np.ndarray, " partial"]

    @classmethod
    def of(cls, reads: Reads, page_size: int) -> tuple[Int[np.ndarray, " reads"], ReadTree]:
        """(order, tree): `order[i]` is the index of the read that comes i-th. There must be a read.

        Raises ValueError if a read is malformed.
        """
        rows, ordinal = np.asarray(reads.rows), np.asarray(reads.ordinal)
        end = ordinal + rows
        if rows.min() < 1 or ordinal.min() < 0:
            raise ValueError("a read needs rows >= 1 and ordinal >= 0")
        own_count = -(-end // page_size)
        own_pages = _page_ids([own.pages for own in reads.own], own_count, "ordinal + rows")
        contexts, context_of = _distinct(reads.context)
        context_pages, context_valid, size = _joined(contexts, page_size)

        pages = np.concatenate([context_pages, own_pages])
        if pages.min() < 0:
            raise ValueError("page ids must not be negative")
        own_end = own_count.cumsum()
        valid = np.concatenate([context_valid, np.full(len(own_pages), page_size, np.int32)])
        valid[own_end + (len(context_pages) - 1)] = end - (own_count - 1) * page_size
        own = own_end - own_count + len(context_pages)
        depth = size[context_of]
        whole = depth + np.where(rows == 1, own_count, (ordinal + 1) // page_size)
        runs = _Runs(pages, valid)
        order, shared = runs.tree_order(size.cumsum() - size, size, context_of, own, whole)
        return order, cls(
            page_size=page_size,
            rows=rows[order],
            end=end[order],
            ordinal=ordinal[order],
            context=(size.cumsum() - size)[context_of[order]],
            depth=depth[order],
            own=own[order],
            count=(depth + own_count)[order],
            whole=whole[order],
            shared=shared,
            pages=pages,
            valid=valid,
            partial=(valid < page_size).nonzero()[0],
        )

    @property
    def leading_full(self) -> Int[np.ndarray, " reads"]:
        """How many pages of each read come before its first partial one."""
        full = self.count - (self.end % self.page_size > 0)
        if not len(self.partial):
            return full
        ahead = np.minimum(self.partial.searchsorted(self.context), len(self.partial) - 1)
        first = self.partial[ahead] - self.context
        return np.where((first >= 0) & (first < self.depth), first, full)

    def split(self, most_rows: int) -> ReadTree:
        """The same rows as reads of at most `most_rows` rows each."""
        if self.rows.max() <= most_rows:
            return self
        pieces = -(-self.rows // most_rows)
        read = np.arange(len(pieces)).repeat(pieces)
        before = ragged_ranges(np.zeros_like(pieces), pieces) * most_rows
        rows = np.minimum(self.rows[read] - before, most_rows)
        ordinal, end, depth = self.ordinal[read] + before, self.end[read], self.depth[read]
        count = depth + -(-(ordinal + rows) // self.page_size)
        whole = depth + (ordinal + 1) // self.page_size
        whole = np.where(ordinal + 1 == end, count, whole)
        return replace(
            self,
            rows=rows,
            end=end,
            ordinal=ordinal,
            context=self.context[read],
            depth=depth,
            own=self.own[read],
            count=count,
            whole=whole,
            shared=np.where(before > 0, np.roll(whole, 1), self.shared[read]),
        )

    def runs(
        self,
        read: Int[np.ndarray, " ranges"] | slice,
        start: Int[np.ndarray, " ranges"] | int,
        stop: Int[np.ndarray, " ranges"],
    ) -> tuple[Int[np.ndarray, "ranges 2"], Int[np.ndarray, "ranges 2"]]:
        """Where `self.pages` has the pages start..stop of reads, context and own: first ones, counts."""
        depth = self.depth[read]
        inside = np.minimum(depth, start)
        first, count = np.empty((2, len(depth), 2), np.int64)
        first[:, 0] = self.context[read] + inside
        first[:, 1] = self.own[read] + (start - inside)
        count[:, 0] = np.minimum(depth, stop) - inside
        count[:, 1] = stop - start - count[:, 0]
        return first, count

    def causal(
        self, read: Int[np.ndarray, " pages"], depth: Int[np.ndarray, " pages"]
    ) -> Int[np.ndarray, " pages"]:
        """The last offset that a read's first row sees of its own page at `depth`; row i sees i more."""
        return self.ordinal[read] - (depth - self.depth[read]) * self.page_size


class _Runs(NamedTuple):
    """Runs of pages, to be compared."""

    pages: np.ndarray
    valid: np.ndarray

    def tree_order(
        self, first: np.ndarray, size: np.ndarray, context_of: np.ndarray, own: np.ndarray, whole: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The reads' order, and how many pages each has in common with the read before it.

        first, size  of the contexts' runs
        own          where each read's own run begins; all of its rows see `whole` leading pages whole
        """
        # A trunk is a context, or of a read without one, its own run.
        depth = size[context_of]
        roots = (depth == 0).nonzero()[0]
        trunk, own_whole = context_of, whole - depth
        if len(roots):
            trunk, own_whole[roots] = trunk.copy(), 0
            trunk[roots] = len(size) + np.arange(len(roots))
            first, size = np.concatenate([first, own[roots]]), np.concatenate([size, whole[roots]])
        trunks, overlap = self.sorted(self.pages[np.minimum(first, len(self.pages) - 1)], first, size)

        # Trunks of the very same pages count as one.
        size = size[trunks]
        new = overlap < size
        new[1:] |= overlap[1:] < size[:-1]
        new[0] = True
        rank = np.empty_like(trunks)
        rank[trunks] = new.cumsum()
        rank = rank[trunk]
        order, shared = self.sorted(rank << 32 | self.pages[own], own, own_whole)
        rank = rank[order]
        same = np.equal(rank[1:], rank[:-1])
        overlap, size = overlap[new], size[new]
        shared[1:] += np.where(same, size[rank[1:] - 1], overlap[rank[1:] - 1])
        return order, shared

    def sorted(self, key: np.ndarray, first: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs by key and then by pages, and how many pages each has in common with the one before it.

        Runs of different keys count as having none.
        """
        order = key.argsort()
        overlap = np.zeros(len(order), np.int64)
        key = key[order]
        tied = (key[1:] == key[:-1]).nonzero()[0]
        if len(tied):
            apart = (tied[1:] > tied[:-1] + 1).nonzero()[0]
            begins = [int(tied[0]), *tied[apart + 1].tolist()]
            ends = [*(tied[apart] + 2).tolist(), int(tied[-1]) + 2]
            words = (self.pages.astype(np.int64) << 32 | self.valid).astype(">i8").tobytes()
            for begin, end in zip(begins, ends, strict=True):
                runs = order[begin:end]
                starts, stops = (8 * first[runs]).tolist(), (8 * (first + size)[runs]).tolist()
                texts = [words[start:stop] for start, stop in zip(starts, stops, strict=True)]
                by_text = sorted(range(len(texts)), key=texts.__getitem__)
                order[begin:end] = runs[by_text]
                overlap[begin:end] = _overlaps([texts[run] for run in by_text], 8)
        return order, overlap


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


def _distinct(objects: Sequence[Any]) -> tuple[list[Any], Int[np.ndarray, " objects"]]:
    """The different objects, and for each of `objects` its index among them."""
    ids = np.fromiter(map(id, objects), np.int64, len(objects))
    by_id = ids.argsort()
    ids = ids[by_id]
    new = np.ones(len(ids), bool)
    np.not_equal(ids[1:], ids[:-1], out=new[1:])
    index = np.empty_like(by_id)
    index[by_id] = new.cumsum() - 1
    return [objects[i] for i in by_id[new].tolist()], index


def _joined(
    contexts: list[Sequence[AnyPageRun]], page_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The contexts' pages end to end, their valid counts, and how many pages each context has."""
    segments = list(chain.from_iterable(contexts))
    length = np.array([segment.length for segment in segments], np.int64)
    count = -(-length // page_size)
    pages = _page_ids([segment.pages for segment in segments], count, "length")
    end = count.cumsum()
    valid = np.full(len(pages) + 1, page_size, np.int32)  # one more, for segments without pages
    valid[np.where(count > 0, end, 0) - 1] = length - (count - 1) * page_size
    sizes = np.array([len(context) for context in contexts])
    if len(segments) > len(contexts) or not sizes.all():
        before = np.zeros(len(end) + 1, np.int64)
        before[1:] = end
        last = sizes.cumsum()
        count = before[last] - before[last - sizes]
    return pages, valid[:-1], count


def _page_ids(runs: list[Any], counts: np.ndarray, positions: str) -> np.ndarray:
    """Page ids of the runs, end to end; raises ValueError unless there are as many as `counts` says."""
    try:
        ids = np.frombuffer(b"".join(runs), np.int32)
    except TypeError:  # not all are arrays
        ids = np.fromiter(chain.from_iterable(runs), np.int32)
    if len(ids) != counts.sum():
        raise ValueError(f"a segment needs as many pages as hold its {positions} positions")
    return ids


def pairs(first: Int[np.ndarray, " pairs"], second: Int[np.ndarray, " pairs"]) -> Int[np.ndarray, "pairs 2"]:
    """As np.column_stack, in a fifth of its time."""
    out = np.empty((len(first), 2), np.int64)
    out[:, 0] = first
    out[:, 1] = second
    return out


def ragged_ranges(
    start: Int[np.ndarray, "*ranges"], count: Int[np.ndarray, "*ranges"]
) -> Int[np.ndarray, " total"]:
    """start[0] .. start[0] + count[0] - 1, start[1] .. and so on, end to end."""
    count = count.ravel()
    end = count.cumsum()
    return (start.ravel() - end + count).repeat(count) + np.arange(end[-1] if len(end) else 0)
