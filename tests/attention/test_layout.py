from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.layout import WHOLE, ItemCapacity, WorkList, lay_out_items
from attention.reads import PageRun, Read, Reads
from tests.attention.forest import (
    Forest,
    forests,
    pages_of,
    positions_listed,
    positions_seen,
    readers_of_shared_pages,
)

ROOM = ItemCapacity(rows=512, items=512, page_refs=4096, page_size=4)


def decode(context: list[int], own: int, filled: int) -> Read:
    """One row at the end of a page of its own, after full context pages of four positions."""
    before = (PageRun(context, 4 * len(context)),) if context else ()
    return Read(before, PageRun([own], filled), rows=1, ordinal=filled - 1)


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


@given(st.one_of(forests(), forests(aliased=True)))
@settings(max_examples=200)
def test_every_row_reads_every_position_that_it_must_once_and_no_other(forest: Forest) -> None:
    order, work = lay_out_items(Reads.of(forest.reads), replace(ROOM, page_size=forest.page_size))
    needed = Counter()
    first_row = 0
    for index in order:
        read = forest.reads[index]
        for row in range(read.rows):
            needed.update(
                (first_row + row, position) for position in positions_seen(read, row, forest.page_size)
            )
        first_row += read.rows
    assert Counter(positions_listed(work)) == needed


@given(forests())
@settings(max_examples=100)
def test_order_is_a_permutation_and_singles_come_first_longest_first(forest: Forest) -> None:
    order, work = lay_out_items(Reads.of(forest.reads), replace(ROOM, page_size=forest.page_size))
    assert sorted(order) == list(range(len(forest.reads)))
    single = slice(int(work.num_single))
    assert (work.item_rows[single, 1] == 1).all()
    assert (work.item_causal[single] == WHOLE).all()
    assert (work.item_rows[work.num_single : work.num_items, 1] > 1).all()
    assert (np.diff(work.item_pages[single, 1]) <= 0).all()
    assert len(set(work.item_rows[single, 0])) == work.num_single


@given(forests())
@settings(max_examples=150)
def test_a_shared_page_is_read_once_and_runs_of_pages_are_maximal(forest: Forest) -> None:
    _, work = lay_out_items(Reads.of(forest.reads), replace(ROOM, page_size=forest.page_size))
    readers = readers_of_shared_pages(forest.reads, forest.page_size)
    assert work.item_pages[: work.num_items, 1].sum() == readers.total()
    assert work.num_items == len(readers)


@given(forests())
@settings(max_examples=100)
def test_the_bucket_capacity_always_suffices(forest: Forest) -> None:
    rows = sum(read.rows for read in forest.reads)
    longest = max(len(pages_of(read)) for read in forest.reads)
    for capacity in (
        ItemCapacity.for_bucket(rows, forest.num_pages, forest.page_size),
        ItemCapacity.for_bucket(rows, forest.num_pages, forest.page_size, pages_per_read=longest),
    ):
        _, work = lay_out_items(Reads.of(forest.reads), capacity)
        assert all(array.size <= room.size for array, room in zip(work, capacity.empty(), strict=True))
        assert {array.dtype for array in work} == {np.dtype(np.int32)}


def test_siblings_share_their_prefix_and_keep_their_tails() -> None:
    reads = [decode([7, 3], 9, 2), decode([], 5, 1), decode([7, 3], 2, 4)]
    order, work = lay_out_items(Reads.of(reads), ROOM)
    assert order.tolist() == [1, 2, 0]
    assert items(work) == [
        ([5], (0, 1), WHOLE),
        ([2], (1, 1), WHOLE),
        ([9], (2, 1), WHOLE),
        ([7, 3], (1, 2), WHOLE),
    ]
    assert work.num_single == 3


def test_a_prompt_chunk_is_one_causal_item() -> None:
    chunk = Read((PageRun([4], 4),), PageRun([5, 6], 6), rows=3, ordinal=3)
    _, work = lay_out_items(Reads.of([chunk]), ROOM)
    assert items(work) == [([4, 5, 6], (0, 3), 7)]


def test_a_chunk_shares_the_pages_that_all_of_its_rows_see_whole() -> None:
    cached = [11, 12]
    chunk = Read((), PageRun([*cached, 20], 11), rows=3, ordinal=8)
    sibling = decode(cached, 30, 1)
    order, work = lay_out_items(Reads.of([chunk, sibling]), ROOM)
    assert order.tolist() == [0, 1]
    assert items(work) == [([30], (3, 1), WHOLE), (cached, (0, 4), WHOLE), ([20], (0, 3), 0)]


def test_a_page_seen_with_different_valid_counts_is_not_shared() -> None:
    reads = [Read((PageRun([1], filled),), PageRun([own], 1), 1, 0) for own, filled in ((2, 3), (3, 4))]
    _, work = lay_out_items(Reads.of(reads), ROOM)
    assert sorted(items(work)) == [([1, 2], (0, 1), WHOLE), ([1, 3], (1, 1), WHOLE)]


def test_equal_contexts_are_shared_and_so_are_the_branches_of_both() -> None:
    """Neither is the same object: a request's pages, told twice."""
    reads = [decode([7, 3], own, 1) for own in (9, 5, 9, 5)]
    order, work = lay_out_items(Reads.of(reads), ROOM)
    assert sorted(order[:2].tolist()) == [1, 3]
    assert items(work) == [([7, 3], (0, 4), WHOLE), ([5], (0, 2), WHOLE), ([9], (2, 2), WHOLE)]


def test_nothing_to_read_is_an_empty_list() -> None:
    order, work = lay_out_items(Reads.of([]), ROOM)
    assert len(order) == 0
    assert work.num_items == 0


@pytest.mark.parametrize("convert", [tuple, partial(array, "i"), partial(np.array, dtype=np.int32)])
def test_pages_may_be_any_sequence(convert: Callable[[list[int]], Any]) -> None:
    reads = [decode([7, 3], 9, 2), decode([7, 3], 2, 4)]
    converted = [
        Read(tuple(PageRun(convert(s.pages), s.length) for s in context), own, rows, ordinal)
        for context, own, rows, ordinal in reads
    ]
    expected, work = (lay_out_items(Reads.of(each), ROOM)[1] for each in (reads, converted))
    for ours, theirs in zip(work, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        (ItemCapacity(rows=1, items=9, page_refs=9, page_size=4), "2 rows"),
        (ItemCapacity(rows=9, items=2, page_refs=9, page_size=4), "3 items"),
        (ItemCapacity(rows=9, items=9, page_refs=3, page_size=4), "4 page references"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_does_not(capacity: ItemCapacity, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lay_out_items(Reads.of([decode([7, 3], 9, 2), decode([7, 3], 2, 4)]), capacity)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (Read((), PageRun([1, 2], 4), 1, 3), "ordinal"),
        (Read((), PageRun([1], 5), 2, 3), "ordinal"),
        (Read((PageRun([1, 2], 4),), PageRun([3], 1), 1, 0), "length"),
        (Read((), PageRun([-1], 4), 1, 3), "not be negative"),
        (Read((), PageRun([1], 4), 0, 3), "rows"),
        (Read((), PageRun([1], 4), 5, -1), "ordinal"),
    ],
)
def test_a_malformed_read_is_refused(read: Read, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lay_out_items(Reads.of([read]), ROOM)


def test_a_small_pool_has_room_for_a_page_that_two_reads_see_differently() -> None:
    reads = [Read((), PageRun([0], filled), rows=1, ordinal=filled - 1) for filled in (2, 4)]
    capacity = ItemCapacity.for_bucket(2, num_pages=1, page_size=4)
    _, work = lay_out_items(Reads.of(reads), capacity)
    assert sorted(work.page_valid[:2].tolist()) == [2, 4]
