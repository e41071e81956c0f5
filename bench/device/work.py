"""What an attention backend makes of a benchmark's reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import numpy as np

from attention import Backend, Capacity, Read, Reads, Sizes, Work

Planner = Callable[[Sequence[Read]], tuple[np.ndarray, Work]]


def planner(backend: Backend, rows: int, sizes: Sizes, pages_per_read: int) -> Planner:
    """What turns reads into (order, work) for a backend; `order[i]` is the read whose rows come i-th.

    Its work has the array sizes of a bucket of `rows` rows over that pool, whatever the reads.
    It can be sent to another process, which needs no device to use it.
    """
    room = backend.capacity(rows, sizes, pages_per_read)
    return partial(_lay_out, backend=backend, capacity=room)


def _lay_out(reads: Sequence[Read], backend: Backend, capacity: Capacity) -> tuple[np.ndarray, Work]:
    return backend.lay_out(Reads.of(reads), capacity)


def row_order(reads: Sequence[Read], order: np.ndarray) -> np.ndarray:
    """[rows] for each row of the work, its index where the reads' rows lie in the reads' own order."""
    ends = np.cumsum([read.rows for read in reads]).tolist()
    rows = [range(ends[i] - reads[i].rows, ends[i]) for i in order.tolist()]
    return np.fromiter(chain.from_iterable(rows), np.int64)
