"""Buckets: the fixed row counts that steps are padded to, each compiled once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator


class Buckets:
    """Ascending row counts."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._rows = sorted(set(rows))
        if not self._rows or self._rows[0] < 1:
            raise ValueError(f"buckets must be one or more positive row counts, got {self._rows}")

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    @property
    def largest(self) -> int:
        return self._rows[-1]

    def fit(self, rows: int) -> int:
        """The smallest bucket that holds `rows`. Raises ValueError beyond the largest."""
        index = bisect_left(self._rows, rows)
        if index == len(self._rows):
            raise ValueError(f"{rows} rows do not fit the largest bucket, {self.largest}")
        return self._rows[index]
