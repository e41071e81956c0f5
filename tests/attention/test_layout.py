from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from attention.layout import WHOLE, Capacity, Read, WorkList, plan_rows
from tests.attention.forest import (
    Forest,
    forests,
    positions_listed,
    positions_seen,
    readers_of_shared_pages,
)

ROOM = Capacity(rows=512, items=512, page_refs=4096)


def decode(pages: list[int], last_valid: int, page_size: int = 4) -> Read:
    """One row at the end of a context whose last page is its own."""
    valid = [page_size] * (len(pages) - 1) + [last_valid]
    return Read(pages, valid, own_pages=1, rows=1, ordinal=last_valid - 1)


def items(work: WorkList) -> list[tuple[list[int], tuple[int, int], int]]:
    """(page ids, (first row, rows), causal) of every item."""
    return [
        (
            work.page_ids[first : first + count].tolist(),
            tuple(work.item_rows[item].tolist()),
            int(work.item_causal[item]),
        )
        for item, (first, count) in enumerate(work.item_pages[: work.num_items].tolist())
    ]


@given(forests())
@settings(max_examples=150, deadline=None)
def test_every_row_reads_every_position_that_it_must_once_and_no_other(forest: Forest) -> None:
    order, work = plan_rows(forest.reads, ROOM, forest.page_size)
    needed = Counter()
    first_row = 0
    for index in order:
        read = forest.reads[index]
        for row in range(read.rows):
            needed.update((first_row + row, position) for position in positions_seen(read, row))
        first_row += read.rows
    assert Counter(positions_listed(work)) == needed


@given(forests())
@settings(max_examples=100, deadline=None)
def test_order_is_a_permutation_and_singles_come_first_longest_first(forest: Forest) -> None:
    order, work = plan_rows(forest.reads, ROOM, forest.page_size)
    assert sorted(order) == list(range(len(forest.reads)))
    single = slice(int(work.num_single))
    assert (work.item_rows[single, 1] == 1).all()
    assert (work.item_causal[single] == WHOLE).all()
    assert (work.item_rows[work.num_single : work.num_items, 1] > 1).all()
    assert (np.diff(work.item_pages[single, 1]) <= 0).all()
    assert len(set(work.item_rows[single, 0])) == work.num_single


@given(forests())
@settings(max_examples=150, deadline=None)
def test_a_shared_page_is_read_once_and_runs_of_pages_are_maximal(forest: Forest) -> None:
    _, work = plan_rows(forest.reads, ROOM, forest.page_size)
    readers = readers_of_shared_pages(forest.reads)
    assert work.item_pages[: work.num_items, 1].sum() == readers.total()
    assert work.num_items == len(readers)


@given(forests())
@settings(max_examples=100, deadline=None)
def test_the_bucket_capacity_always_suffices(forest: Forest) -> None:
    rows = sum(read.rows for read in forest.reads)
    longest = max(len(read.pages) for read in forest.reads)
    for capacity in (
        Capacity.for_bucket(rows, forest.num_pages),
        Capacity.for_bucket(rows, forest.num_pages, pages_per_read=longest),
    ):
        _, work = plan_rows(forest.reads, capacity, forest.page_size)
        assert [array.shape for array in work] == [array.shape for array in capacity.empty()]
        assert {array.dtype for array in work} == {np.dtype(np.int32)}


def test_siblings_share_their_prefix_and_keep_their_tails() -> None:
    reads = [decode([7, 3, 9], 2), decode([5], 1), decode([7, 3, 2], 4)]
    order, work = plan_rows(reads, ROOM, page_size=4)
    assert order.tolist() == [1, 2, 0]
    assert items(work) == [
        ([5], (0, 1), WHOLE),
        ([2], (1, 1), WHOLE),
        ([9], (2, 1), WHOLE),
        ([7, 3], (1, 2), WHOLE),
    ]
    assert work.num_single == 3


def test_a_prompt_chunk_is_one_causal_item() -> None:
    _, work = plan_rows([Read([4, 5, 6], [4, 4, 2], own_pages=2, rows=3, ordinal=3)], ROOM, page_size=4)
    assert items(work) == [([4, 5, 6], (0, 3), 7)]


def test_a_chunk_shares_the_pages_that_all_of_its_rows_see_whole() -> None:
    cached = [11, 12]
    chunk = Read([*cached, 20], [4, 4, 3], own_pages=3, rows=3, ordinal=8)
    sibling = decode([*cached, 30], 1)
    order, work = plan_rows([chunk, sibling], ROOM, page_size=4)
    assert order.tolist() == [0, 1]
    assert items(work) == [([30], (3, 1), WHOLE), (cached, (0, 4), WHOLE), ([20], (0, 3), 0)]


def test_a_page_seen_with_different_valid_counts_is_not_shared() -> None:
    reads = [Read([1, 2], [3, 1], 1, 1, 0), Read([1, 3], [4, 1], 1, 1, 0)]
    _, work = plan_rows(reads, ROOM, page_size=4)
    assert sorted(items(work)) == [([1, 2], (0, 1), WHOLE), ([1, 3], (1, 1), WHOLE)]


def test_a_single_row_that_sees_part_of_its_segment_is_cut_to_what_it_sees() -> None:
    _, work = plan_rows([Read([1, 2, 3], [4, 4, 4], own_pages=3, rows=1, ordinal=5)], ROOM, page_size=4)
    assert items(work) == [([1, 2], (0, 1), WHOLE)]
    assert work.page_valid[:2].tolist() == [4, 2]


def test_nothing_to_read_is_an_empty_list() -> None:
    order, work = plan_rows([], ROOM, page_size=4)
    assert len(order) == 0
    assert work.num_items == 0


def test_arrays_and_sequences_of_pages_plan_alike() -> None:
    reads = [decode([7, 3, 9], 2), decode([7, 3, 2], 4)]
    arrays = [
        Read(np.array(read.pages), np.array(read.valid), read.own_pages, read.rows, read.ordinal)
        for read in reads
    ]
    for ours, theirs in zip(plan_rows(reads, ROOM, 4)[1], plan_rows(arrays, ROOM, 4)[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        (Capacity(rows=1, items=9, page_refs=9), "2 rows"),
        (Capacity(rows=9, items=2, page_refs=9), "3 items"),
        (Capacity(rows=9, items=9, page_refs=3), "4 page references"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_does_not(capacity: Capacity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rows([decode([7, 3, 9], 2), decode([7, 3, 2], 4)], capacity, page_size=4)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (Read([1, 2], [4], 1, 1, 0), "valid count"),
        (Read([1], [5], 1, 1, 0), r"1\.\.4"),
        (Read([1], [0], 1, 1, 0), r"1\.\.4"),
        (Read([-1], [4], 1, 1, 0), "not negative"),
        (Read([1], [4], 2, 1, 0), "own_pages"),
        (Read([1], [4], 1, 0, 0), "rows"),
        (Read([1], [4], 1, 2, 3), "last row"),
    ],
)
def test_a_malformed_read_is_refused(read: Read, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rows([read], ROOM, page_size=4)
