"""The work list of a benchmark's reads, from the planner that the attention backend goes with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from attention import Capacity, Read, plan_rows


def plan_work(
    backend: str,
    reads: Sequence[Read],
    *,
    rows: int,
    num_pages: int,
    page_size: int,
    q_heads: int,
    kv_heads: int,
) -> tuple[np.ndarray, Any]:
    """(order, work list) of the reads; `order[i]` is the read whose rows come i-th.

    The list has the array sizes of a bucket of `rows` rows over a pool of `num_pages`, whatever the reads.
    """
    del backend, q_heads, kv_heads  # both backends so far take the same list
    return plan_rows(reads, Capacity.for_bucket(rows, num_pages), page_size)


def moved(work: Any, pages: int) -> Any:
    """The same work list over pages that lie `pages` further on in the pool."""
    return work._replace(page_ids=work.page_ids + np.int32(pages))


def row_order(reads: Sequence[Read], order: np.ndarray) -> np.ndarray:
    """[rows] for each row of the work list, its index where the reads' rows lie in the reads' own order."""
    ends = np.cumsum([read.rows for read in reads]).tolist()
    rows = [range(ends[i] - reads[i].rows, ends[i]) for i in order.tolist()]
    return np.fromiter(chain.from_iterable(rows), np.int64)
