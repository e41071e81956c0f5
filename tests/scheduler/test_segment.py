from __future__ import annotations

from array import array

from scheduler.pages import PagePool
from scheduler.segment import Segment, text
from scheduler.step import SegmentRead


def computed(pool: PagePool, tokens: list[int], start: int = 0) -> Segment:
    segment = Segment(0, start, ())
    segment.extend(tokens)
    segment.pages = tuple(pool.allocate(pool.pages_for(len(tokens))))
    segment.computed = len(tokens)
    return segment


def test_a_segment_knows_what_is_missing() -> None:
    segment = Segment(0, 10, ())
    segment.extend([1, 2, 3])
    segment.computed = 1
    assert (segment.end, segment.missing) == (13, 2)
    segment.computed = 4  # the launched step feeds a token that has not come back
    assert segment.missing == 0


def test_given_and_generated_tokens_are_told_apart() -> None:
    segment = Segment(0, 0, ())
    segment.extend([1, 2])
    segment.append(3)
    segment.extend([4, 5], sampled=[True, False])
    assert segment.tokens == [1, 2, 3, 4, 5]
    assert list(segment.sampled) == [0, 0, 1, 1, 0]


def test_a_cut_gives_back_the_pages_beyond() -> None:
    pool = PagePool(4, 2)
    segment = computed(pool, [1, 2, 3, 4, 5])
    segment.cut(3, pool)
    assert (segment.tokens, segment.computed, pool.owned) == ([1, 2, 3], 3, 2)
    segment.cut(2, pool)
    assert (segment.computed, pool.owned) == (2, 1)
    segment.cut(0, pool)
    assert (segment.tokens, segment.computed, pool.owned) == ([], 0, 0)


def test_a_cut_forgets_what_was_computed_of_tokens_that_never_came() -> None:
    pool = PagePool(4, 2)
    segment = computed(pool, [1, 2])
    segment.computed, segment.pages = 3, array("i", [*segment.pages, *pool.allocate(1)])
    segment.cut(2, pool)
    assert (segment.computed, segment.missing, pool.owned) == (2, 0, 1)


def test_a_page_that_is_cut_into_is_not_shared_any_more() -> None:
    pool = PagePool(4, 2)
    segment = computed(pool, [1, 2, 3, 4])
    segment.shared = 2
    segment.cut(3, pool)
    assert segment.shared == 1


def test_a_dropped_segment_keeps_its_tokens() -> None:
    pool = PagePool(4, 2)
    segment = computed(pool, [1, 2, 3])
    segment.shared = 1
    segment.drop(pool)
    assert (segment.tokens, segment.missing, pool.owned) == ([1, 2, 3], 3, 0)
    assert segment.shared == 0, "pages that it does not have are no longer shared"


def test_a_read_names_the_filled_pages() -> None:
    pool = PagePool(4, 2)
    segment = computed(pool, [1, 2, 3])
    assert segment.read(pool) == SegmentRead(segment.pages, 3)
    segment.computed = 2
    assert segment.read(pool) == SegmentRead(segment.pages[:1], 2)


def test_the_chain_ends_with_the_segment() -> None:
    root = Segment(0, 0, ())
    child = Segment(1, 3, root.chain)
    assert child.chain == (root, child)


def test_text_has_a_token_that_siblings_share_once() -> None:
    root = Segment(0, 0, ())
    root.extend([1])
    segments = [root]
    for number in (1, 2, 3):
        branch = Segment(number, 1, (root,), lead=0)
        branch.extend([9], sampled=[True])
        branch.extend([number])
        segments.append(branch)
    assert text(segments) == ([1, 9, 1, 2, 3], bytearray([0, 1, 0, 0, 0]))
    assert text(segments[2:3]) == ([9, 2], bytearray([1, 0])), "alone, a branch has it too"


def test_text_passes_over_a_branch_that_gave_its_only_token_to_its_own_branches() -> None:
    emptied, nested, sibling = Segment(1, 1, (), lead=0), Segment(2, 1, (), lead=0), Segment(3, 1, (), lead=0)
    nested.extend([9, 5])
    sibling.extend([9, 6])
    assert text([emptied, nested, sibling])[0] == [9, 5, 6]
