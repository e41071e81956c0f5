"""Steps that are made up, to be timed: every kind of load that a bucket can have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scheduler.predictor import StepLoad
from scheduler.step import Entry, SegmentRead, Step

WIDTHS = (1, 4, 16)
KV_SHARES = (0.0, 0.2, 0.45, 0.85)  # of the pool
CHUNKS = ((32, 512), (32, 4096), (128, 0), (128, 2048), (256, 0), (256, 4096))  # rows, positions before them
PREFIX_SHARE = 0.6  # of a group's KV, where branches share


class Shape(NamedTuple):
    """`rows` decode rows in groups of `width`, which read `pages` pages in all.

    Beside them, a prompt chunk of `chunk` rows after `before` positions of its own.
    """

    bucket: int
    rows: int
    width: int
    pages: int
    chunk: int = 0
    before: int = 0


def shapes(buckets: Sequence[int], num_pages: int, page_size: int) -> Iterator[Shape]:
    """Every bucket x fill x width x KV level that the pool holds; without a chunk, and with one in turn."""
    chunks = itertools.cycle(CHUNKS)
    for smaller, bucket in itertools.pairwise((0, *sorted(buckets))):
        for total in sorted({smaller + 1, bucket}):
            for width, share in itertools.product(WIDTHS, KV_SHARES):
                for chunk, before in ((0, 0), next(chunks)):
                    rows = total - chunk
                    left = num_pages - -(-(chunk + before) // page_size)
                    least = rows + -(-rows // width)  # a page for each tail and prefix
                    wanted = int(share * num_pages)
                    if rows >= width and least <= left and (not share or least < wanted):
                        yield Shape(bucket, rows, width, min(left, max(least, wanted)), chunk, before)


def probe(shape: Shape, page_size: int) -> tuple[Step, StepLoad]:
    """A step of that shape, and its load. Its pages are all different, the shared prefixes' apart."""
    free = itertools.count()
    groups = -(-shape.rows // shape.width)
    each = shape.pages // groups
    prefix = int(PREFIX_SHARE * each) if shape.width > 1 else 0
    tail = max(1, (each - prefix) // shape.width)
    entries: list[Entry] = []
    load = StepLoad(0)
    for group in range(groups):
        context = (_pages(free, prefix, page_size),) if prefix else ()
        load = load.plus(StepLoad(0, shared_kv=prefix * page_size, items=len(context)))
        for _ in range(min(shape.width, shape.rows - group * shape.width)):
            own = _pages(free, tail, page_size)
            entries.append(_entry(len(entries), own.length - 1, 1, context, own))
            seen = own.length + prefix * page_size
            load = load.plus(StepLoad(1, private_kv=own.length, items=1, raw_kv=seen))
    if shape.chunk:
        length = shape.before + shape.chunk
        own = SegmentRead(_pages(free, -(-length // page_size), page_size).pages, length)
        entries.append(_entry(len(entries), shape.before, shape.chunk, (), own))
        later = sum(range(shape.before + 2, length + 1))  # what the rows after the first see
        load = load.plus(StepLoad(shape.chunk, 0, length, 1, later, length))
    return Step(-1, tuple(entries), slots=(), bucket=shape.bucket), load


def _pages(free: Iterator[int], count: int, page_size: int) -> SegmentRead:
    return SegmentRead(tuple(itertools.islice(free, count)), count * page_size)


def _entry(number: int, ordinal: int, rows: int, context: tuple[SegmentRead, ...], own: SegmentRead) -> Entry:
    start = sum(read.length for read in context) + ordinal
    slot = number if rows == 1 else None
    return Entry(
        request_id="",
        branch=number,
        segment=number,
        slot=slot,
        start=start,
        ordinal=ordinal,
        rows=rows,
        tokens=(0,) * rows,
        context=context,
        own=own,
        samples=slot is not None,
        path=(),
    )
