"""Requests whose tokens came when the test says so."""

from __future__ import annotations

from bench.load.measures import Record
from bench.load.workload import Item


def seen(item: Item, first: float, *gaps: float, arrival: float = 0.0) -> Record:
    """A request whose first token comes at `first` and each later one so many seconds after the last."""
    record = Record(item, arrival)
    record.emit(first)
    for gap in gaps:
        record.emit(record.last + gap)
    record.finished = record.tokens == item.tokens
    return record
