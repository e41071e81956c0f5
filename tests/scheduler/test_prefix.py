"""What a request's first segment takes from the prefix cache, and gives to it."""

from __future__ import annotations

from scheduler.pages import PagePool
from scheduler.prefix import CachedPrefix
from scheduler.segment import Segment


def prefix(pool: PagePool, tokens: list[int]) -> CachedPrefix:
    """A trunk's segment of these tokens, with what the cache has of it."""
    segment = Segment(0, 0, ())
    segment.extend(tokens)
    cached = CachedPrefix(segment, "", pool)
    cached.reuse(sealed=True)
    return cached


def compute(cached: CachedPrefix, pool: PagePool) -> None:
    segment = cached.segment
    segment.pages.extend(pool.allocate(pool.pages_for(len(segment.tokens)) - len(segment.pages)))
    segment.computed = len(segment.tokens)


def served(pool: PagePool, tokens: list[int]) -> Segment:
    cached = prefix(pool, tokens)
    compute(cached, pool)
    cached.publish()
    return cached.segment


def test_pages_that_follow_cached_ones_are_found_by_the_next_request() -> None:
    pool = PagePool(8, 2)
    served(pool, [1, 2])
    longer = served(pool, [1, 2, 3, 4, 5, 6])
    assert prefix(pool, [1, 2, 3, 4, 5, 6]).segment.pages == longer.pages


def test_of_two_requests_that_compute_the_same_pages_one_gives_its_own_back() -> None:
    pool = PagePool(8, 2)
    first, second = (prefix(pool, [1, 2, 3, 4, 5]) for _ in range(2))
    for cached in (first, second):
        compute(cached, pool)
    for cached in (first, second):
        cached.publish()
    assert second.segment.pages[:2] == first.segment.pages[:2]
    assert second.segment.pages[2] != first.segment.pages[2]
    assert pool.owned == 4
    pool.check([first.segment.pages, second.segment.pages])
