from __future__ import annotations

import pytest

from scheduler.buckets import Buckets


def test_rows_take_the_smallest_bucket_that_holds_them() -> None:
    buckets = Buckets([8, 2, 32, 8])
    assert list(buckets) == [2, 8, 32]
    assert [buckets.fit(rows) for rows in (0, 1, 2, 3, 8, 9, 32)] == [2, 2, 2, 8, 8, 32, 32]
    assert buckets.largest == 32


def test_more_rows_than_the_largest_bucket_are_refused() -> None:
    with pytest.raises(ValueError, match="33 rows do not fit the largest bucket, 32"):
        Buckets([32]).fit(33)


@pytest.mark.parametrize("rows", [[], [0, 4]])
def test_buckets_are_positive(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="positive row counts"):
        Buckets(rows)
