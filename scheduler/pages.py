"""KV pages: who owns which, and which full prompt pages can be shared between requests.

A page is free, owned (by one or more segments), or cached (owned by nobody, kept for its content until the
space is needed). free + cached + owned = total, always: `PagePool.check` proves it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence


class OutOfPagesError(Exception):
    """Fewer pages can be had than were asked for; nothing was allocated."""


class PrefixCache:
    """Full pages by content: key = H(key of the page before, token ids, salt), so a key names a whole prefix.

    A page stays listed while segments own it; once nobody does it is *idle* and may be evicted, the one that
    became idle first going first. Who owns a listed page owns the listed pages before it, so a page is listed
    only as long as its whole prefix is.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def keys(self, tokens: Sequence[int], salt: str, after: bytes | None = None) -> Iterator[bytes]:
        """The keys of the full pages of `tokens`, which start at position 0 or right after page `after`."""
        key = hashlib.blake2b(salt.encode(), digest_size=16).digest() if after is None else after
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            content = array("q", tokens[end - self.page_size : end]).tobytes()
            key = hashlib.blake2b(content, key=key, digest_size=16).digest()
            yield key

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix of `keys`."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: bytes, page: int) -> int:
        """List an owned page under its key. Returns the page that is listed: a known key keeps its first."""
        listed = self._page_of.setdefault(key, page)
        if listed == page:
            self._key_of[page] = key
        return listed

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    @property
    def idle(self) -> int:
        """Pages that could be evicted now."""
        return len(self._idle)

    def set_idle(self, page: int, idle: bool) -> None:
        if idle:
            self._idle[page] = None
        else:
            self._idle.pop(page, None)

    def evict(self) -> int:
        """Forget the page that has been idle longest, and return it."""
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page


class PagePool:
    """A fixed number of KV pages with an owner count each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.cache = PrefixCache(page_size)
        self._owners = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def available(self) -> int:
        """Pages that can be allocated now, counting cached ones that nobody owns."""
        return len(self._free) + self.cache.idle

    @property
    def owned(self) -> int:
        return self.num_pages - self.available

    @property
    def free(self) -> frozenset[int]:
        """The pages that nobody owns and the cache does not keep."""
        return frozenset(self._free)

    def owners(self, page: int) -> int:
        """How many segments hold `page`."""
        return self._owners[page]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` positions of one segment."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; cached pages give way. Raises OutOfPagesError."""
        if count > self.available:
            raise OutOfPagesError(f"{count} pages wanted, {self.available} of {self.num_pages} available")
        while len(self._free) < count:
            self._free.append(self.cache.evict())
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each page."""
        for page in pages:
            self.cache.set_idle(page, idle=False)
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each page, the last page first: the deepest cached page is evicted first."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self.cache:
                    self.cache.set_idle(page, idle=True)
                else:
                    self._free.append(page)

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless `owned`, every segment's pages, explains every owner count."""
        owners = [0] * self.num_pages
        for pages in owned:
            for page in pages:
                owners[page] += 1
        assert owners == self._owners, "owner counts differ from what the segments hold"
        unowned = sum(count == 0 for count in owners)
        assert unowned == len(self._free) + self.cache.idle, "free + cached + owned != total"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(owners[page] == 0 for page in self._free), "a free page has an owner"
