"""Step -> StepInputs: rows in tree order, and where each reads, writes and samples. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from attention import Reads
from model.sampling import SampleInputs, branch_key
from model.step import StepInputs, StepLayout
from scheduler.step import Entry, Step

_branch_key = lru_cache(maxsize=65536)(branch_key)


def step_inputs(step: Step, layout: StepLayout) -> StepInputs:
    """The arrays of a step, not yet padded. Samples are in the step's order; rows are in tree order."""
    columns, backend = _Columns(step.entries), layout.backend
    order, work = backend.lay_out_unpadded(columns.reads, layout.capacity)
    page_size = layout.page_size
    count = columns.rows[order]
    end = count.cumsum()
    entry = order.repeat(count)  # of each row
    index = np.arange(len(entry)) - (end - count).repeat(count)  # of each row in its entry
    ordinal = columns.ordinal[entry] + index
    tokens, write_page = columns.first_token[entry], columns.last_page[entry]
    for place in (count > 1).nonzero()[0].tolist():
        chunk, rows = step.entries[order[place]], slice(end[place] - count[place], end[place])
        assert chunk.tokens is not None, "only one row can feed the slot's last token"
        tokens[rows] = chunk.tokens
        write_page[rows] = np.array(chunk.own.pages)[ordinal[rows] // page_size]

    last_row = np.empty_like(end)
    last_row[order] = end - 1
    sampled = columns.samples.nonzero()[0]
    slot = columns.slot[sampled]
    count_fed = np.ones(len(slot), np.int32)
    if step.slots:
        count_fed[np.isin(slot, [setup.slot for setup in step.slots])] = 0
    return StepInputs(
        tokens=_int32(tokens),
        positions=_int32(columns.start[entry] + index),
        write_page=_int32(write_page),
        write_offset=_int32(ordinal % page_size),
        work=work,
        sample=SampleInputs(
            row=_int32(last_row[sampled]),
            slot=_int32(slot),
            branch_key=_int32(columns.branch_key[sampled]),
            position=_int32((columns.start + columns.rows)[sampled]),
            count_fed=count_fed,
        ),
    )


class _Columns:
    """A step's entries by column: hundreds of rows are quicker to handle as arrays.

    slot         -1 where there is none
    first_token  -1 - slot where the slot's last token is fed
    last_page    the page that the last row writes to
    """

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        columns: Any = Entry._make(zip(*entries, strict=True))
        self.start, self.ordinal, self.rows = map(_integers, (columns.start, columns.ordinal, columns.rows))
        self.reads = Reads(columns.context, columns.own, self.rows, self.ordinal)
        self.slot = _integers([-1 if slot is None else slot for slot in columns.slot])
        self.first_token = _integers([-1 if tokens is None else tokens[0] for tokens in columns.tokens])
        of_slot = self.first_token < 0
        assert (self.slot[of_slot] >= 0).all(), "only an entry with a slot can feed the slot's last token"
        self.first_token[of_slot] = -1 - self.slot[of_slot]
        self.last_page = _integers([own.pages[-1] for own in columns.own])
        self.samples = np.fromiter(columns.samples, bool, len(entries))
        self.branch_key = _integers([_branch_key(path) for path in columns.path])


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.fromiter(values, np.int64, len(values))


def _int32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32)
