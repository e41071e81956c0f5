"""A request's prompt, and what follows it until the first fork, as far as the prefix cache has it."""

from __future__ import annotations

from array import array

from scheduler.pages import PagePool
from scheduler.segment import Segment


class CachedPrefix:
    """The first segment of a request: its full pages are published, and found again by whoever begins alike.

    segment  what the trunk writes until it forks; its `shared` pages are in the cache
    salt     only requests of the same salt share pages
    """

    __slots__ = ("_last", "_pool", "_salt", "segment")

    def __init__(self, segment: Segment, salt: str, pool: PagePool) -> None:
        self.segment = segment
        self._salt = salt
        self._pool = pool
        self._last: bytes | None = None  # key of the last page that is in the cache

    def reuse(self, *, sealed: bool) -> None:
        """Take the cached pages, but never the page of the token that the trunk samples from.

        It samples from none of them once it is `sealed`.
        """
        segment, pool = self.segment, self._pool
        keys = list(pool.cache.keys(segment.tokens[: None if sealed else -1], self._salt))
        pages = pool.cache.lookup(keys)
        pool.share(pages)
        segment.pages = array("i", pages)
        segment.shared = len(pages)
        segment.computed = len(pages) * pool.page_size
        self._last = keys[len(pages) - 1] if pages else None

    def publish(self) -> None:
        """Offer the full, computed pages to the cache."""
        segment, pool = self.segment, self._pool
        if not segment.pages:
            return
        index = segment.shared
        full = min(segment.computed, len(segment.tokens)) // pool.page_size
        if full == index:
            return
        tokens = segment.tokens[index * pool.page_size : full * pool.page_size]
        pages = [*segment.pages]
        for key in pool.cache.keys(tokens, self._salt, self._last):
            own, listed = pages[index], pool.cache.insert(key, pages[index])
            if listed != own:  # somebody else computed the same page: one of the two will do
                pool.share([listed])
                pool.release([own])
                pages[index] = listed
            index += 1
            self._last = key
        segment.pages, segment.shared = array("i", pages), index
