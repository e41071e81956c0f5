from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.pages import OutOfPagesError, PagePool
from tests.scheduler.strategies import examples

TOKENS = [*range(8)] * 3


def keys(pool: PagePool, tokens: list[int], salt: str = "") -> list[bytes]:
    return list(pool.cache.keys(tokens, salt))


def publish(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Pages that hold `tokens`, listed, and owned once."""
    pages = pool.allocate(len(tokens) // pool.page_size)
    return [pool.cache.insert(key, page) for key, page in zip(keys(pool, tokens, salt), pages, strict=True)]


def test_a_released_page_is_free_only_when_nobody_owns_it() -> None:
    pool = PagePool(4, 2)
    pages = pool.allocate(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert (pool.owned, pool.available) == (1, 3)
    pool.release(pages[:1])
    assert (pool.owned, pool.available) == (0, 4)


def test_an_allocation_that_cannot_be_met_takes_nothing() -> None:
    pool = PagePool(4, 2)
    pool.allocate(3)
    with pytest.raises(OutOfPagesError, match="2 pages wanted, 1 of 4 available"):
        pool.allocate(2)
    assert pool.available == 1


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert PagePool(1, 4).pages_for(tokens) == pages


def test_keys_name_full_pages_and_all_that_came_before() -> None:
    pool = PagePool(1, 4)
    assert len(keys(pool, TOKENS[:11])) == 2
    assert keys(pool, TOKENS[:11]) == keys(pool, TOKENS[:8])
    assert keys(pool, [9, *TOKENS[1:8]])[1] != keys(pool, TOKENS[:8])[1]
    assert len({*keys(pool, TOKENS), *keys(pool, TOKENS, "salt")}) == 12


def test_keys_go_on_after_a_page() -> None:
    pool = PagePool(1, 4)
    first, *rest = keys(pool, TOKENS)
    assert list(pool.cache.keys(TOKENS[4:], "", after=first)) == rest


def test_a_listed_page_is_found_until_it_is_needed_for_something_else() -> None:
    pool = PagePool(4, 4)
    pages = publish(pool, TOKENS[:8])
    pool.release(pages)
    assert (pool.owned, pool.available, pool.cache.idle) == (0, 4, 2)
    assert pool.cache.lookup(keys(pool, TOKENS[:12])) == pages
    pool.allocate(3)
    assert pool.cache.lookup(keys(pool, TOKENS[:12])) == pages[:1], "the deepest page goes first"


def test_a_shared_page_is_not_evicted() -> None:
    pool = PagePool(3, 4)
    pages = publish(pool, TOKENS[:8])
    pool.release(pages)
    pool.share(pages[:1])
    pool.allocate(2)
    assert pool.cache.lookup(keys(pool, TOKENS[:8])) == pages[:1]


def test_the_page_idle_longest_is_evicted_first() -> None:
    pool = PagePool(2, 4)
    old, new = publish(pool, TOKENS[:4]), publish(pool, TOKENS[4:8])
    pool.release(old)
    pool.release(new)
    pool.share(old)
    pool.release(old)
    pool.allocate(1)
    assert pool.cache.lookup(keys(pool, TOKENS[4:8])) == []
    assert pool.cache.lookup(keys(pool, TOKENS[:4])) == old


def test_a_known_key_keeps_its_first_page() -> None:
    pool = PagePool(4, 4)
    first = publish(pool, TOKENS[:4])
    assert publish(pool, TOKENS[:4]) == first


def test_salts_do_not_share_pages() -> None:
    pool = PagePool(4, 4)
    publish(pool, TOKENS[:4], salt="a")
    assert pool.cache.lookup(keys(pool, TOKENS[:4], "b")) == []


def test_check_finds_what_is_wrong() -> None:
    pool = PagePool(4, 4)
    pages = pool.allocate(2)
    pool.check([pages])
    with pytest.raises(AssertionError, match="owner counts"):
        pool.check([pages[:1]])


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, list and give back pages of a small pool, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(7, 2)
        self.held: list[list[int]] = []
        self.texts = 0

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        available = self.pool.available
        try:
            self.held.append(self.pool.allocate(count))
        except OutOfPagesError:
            assert count > available
        else:
            assert self.pool.available == available - count

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.pool.share(pages)
        self.held.append([*pages])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(length=st.integers(1, 3), variant=st.integers(0, 1))
    def start_from_cache(self, length: int, variant: int) -> None:
        """As a request does: share what is known, compute the rest, list it."""
        keys = list(self.pool.cache.keys([variant, *range(2 * length - 1)], ""))
        pages = self.pool.cache.lookup(keys)
        self.pool.share(pages)
        missing = length - len(pages)
        if missing > self.pool.available:
            self.pool.release(pages)
            return
        own = self.pool.allocate(missing)
        listed = [
            self.pool.cache.insert(key, page) for key, page in zip(keys[len(pages) :], own, strict=True)
        ]
        assert listed == own
        self.held.append([*pages, *own])

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check(self.held)

    def teardown(self) -> None:
        for pages in self.held:
            self.pool.release(pages)
        assert self.pool.owned == 0
        assert self.pool.available == 7


TestPool = PoolMachine.TestCase
TestPool.settings = examples(60, stateful_step_count=30)
