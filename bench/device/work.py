"""Work lists of a benchmark's reads, from the planner that the attention backend goes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from attention import Read, Reads, capacity, plan

Planner = Callable[[Sequence[Read]], tuple[np.ndarray, Any]]


def planner(
    backend: str,
    *,
    rows: int,
    num_pages: int,
    pages_per_read: int,
    page_size: int,
    q_heads: int,
    kv_heads: int,
) -> Planner:
    """What turns reads into (order, work list) for a backend; `order[i]` is the read whose rows come i-th.

    Its lists have the array sizes of a bucket of `rows` rows over a pool of `num_pages`, whatever the reads.
    It can be sent to another process, which needs no device to use it.
    """
    room = capacity(
        backend,
        rows,
        num_pages,
        heads=q_heads,
        kv_heads=kv_heads,
        page_size=page_size,
        pages_per_read=pages_per_read,
    )
    return partial(_plan, capacity=room, page_size=page_size)


def _plan(reads: Sequence[Read], **room: Any) -> tuple[np.ndarray, Any]:
    return plan(Reads.of(reads), **room)


def moved(work: Any, pages: int) -> Any:
    """The same work list over pages that lie `pages` further on in the pool."""
    return work._replace(page_ids=work.page_ids + np.int32(pages))


def row_order(reads: Sequence[Read], order: np.ndarray) -> np.ndarray:
    """[rows] for each row of the work list, its index where the reads' rows lie in the reads' own order."""
    ends = np.cumsum([read.rows for read in reads]).tolist()
    rows = [range(ends[i] - reads[i].rows, ends[i]) for i in order.tolist()]
    return np.fromiter(chain.from_iterable(rows), np.int64)
