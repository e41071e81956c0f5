"""StepPlan -> StepInputs: rows in tree order, and where each reads, writes and samples. NumPy only."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

import attention
from attention import Capacity, Read, TileCapacity
from model.sampling import SampleInputs, branch_key
from model.step import StepInputs
from scheduler.plan import Entry, SegmentRead, StepPlan

_branch_key = lru_cache(maxsize=65536)(branch_key)


def step_inputs(plan: StepPlan, capacity: Capacity | TileCapacity, page_size: int) -> StepInputs:
    """The arrays of a step, not yet padded. Samples are in the plan's order; rows are in tree order."""
    entries = plan.entries
    order, work = attention.plan([_read(entry, page_size) for entry in entries], capacity, page_size)
    tokens: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    offsets: list[int] = []
    last_row: dict[int, int] = {}
    for index in order.tolist():
        entry = entries[index]
        if entry.tokens is None:
            assert entry.slot is not None, "only an entry with a slot can feed the slot's last token"
            tokens.append(-1 - entry.slot)
        else:
            tokens.extend(entry.tokens)
        for row in range(entry.rows):
            page, offset = divmod(entry.ordinal + row, page_size)
            positions.append(entry.start + row)
            pages.append(entry.own.pages[page])
            offsets.append(offset)
        last_row[index] = len(tokens) - 1

    sampled = [(index, entry) for index, entry in enumerate(entries) if entry.samples]
    new_slots = {setup.slot for setup in plan.slots}
    sample = SampleInputs(
        row=np.array([last_row[index] for index, _ in sampled], np.int32),
        slot=np.array([entry.slot for _, entry in sampled], np.int32),
        branch_key=np.array([_branch_key(entry.path) for _, entry in sampled], np.int32),
        position=np.array([entry.start + entry.rows for _, entry in sampled], np.int32),
        count_fed=np.array([entry.slot not in new_slots for _, entry in sampled], np.int32),
    )
    return StepInputs(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        write_page=np.array(pages, np.int32),
        write_offset=np.array(offsets, np.int32),
        work=work,
        sample=sample,
    )


def _read(entry: Entry, page_size: int) -> Read:
    pages: list[int] = []
    valid: list[int] = []
    for segment in (*entry.context, entry.own):
        pages += segment.pages
        valid += _valid(segment, page_size)
    return Read(
        pages=pages,
        valid=valid,
        own_pages=len(entry.own.pages),
        rows=entry.rows,
        ordinal=entry.ordinal,
    )


def _valid(segment: SegmentRead, page_size: int) -> list[int]:
    """Filled positions of each of the segment's pages: all are full but the last."""
    full = len(segment.pages) - 1
    return [page_size] * full + [segment.length - full * page_size] if segment.pages else []
