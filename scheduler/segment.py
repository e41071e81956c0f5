"""A segment: a run of KV pages that a set of query rows reads; a node of a request's tree.

    tokens     [0 ................ computed) [computed ..... len(tokens))   then tokens still in flight
    KV         written by launched steps     not yet fed

A segment starts on a fresh page (or on shared, full, cached ones), so any number of segments can follow it.
Its ancestors are fixed at birth: a replay after a preemption reads exactly what the first run read.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.pages import PagePool
from scheduler.plan import SegmentRead


class Segment:
    """Token ids, where they stand, and the pages of those that are computed.

    start     rotary position of the first token
    lead      leading tokens that only repeat those of an elder sibling (a fork's shared token): 0 or 1
    sampled   for each token, whether it was generated (1) or given (0)
    shared    leading pages that are in the prefix cache
    """

    __slots__ = ("ancestors", "computed", "id", "lead", "pages", "sampled", "shared", "start", "tokens")

    def __init__(self, id: int, start: int, ancestors: tuple[Segment, ...], lead: int = 0) -> None:
        self.id = id
        self.start = start
        self.ancestors = ancestors
        self.lead = lead
        self.tokens: list[int] = []
        self.sampled = bytearray()
        self.pages: list[int] = []
        self.computed = 0
        self.shared = 0

    @property
    def end(self) -> int:
        """Rotary position of the next token."""
        return self.start + len(self.tokens)

    @property
    def missing(self) -> int:
        """Known tokens whose KV no launched step writes."""
        return max(0, len(self.tokens) - self.computed)

    def extend(self, tokens: Sequence[int], sampled: bool | bytes = False) -> None:
        self.tokens.extend(tokens)
        self.sampled.extend(sampled if isinstance(sampled, bytes) else bytes([sampled]) * len(tokens))

    def cut(self, length: int, pool: PagePool) -> None:
        """Keep the first `length` tokens. What was written beyond is never read: readers count positions."""
        del self.tokens[length:], self.sampled[length:]
        self.computed = min(self.computed, length)
        keep = pool.pages_for(length)
        pool.release(self.pages[keep:])
        del self.pages[keep:]

    def drop(self, pool: PagePool) -> None:
        """Give up the pages; the tokens can be replayed."""
        pool.release(self.pages)
        self.pages = []
        self.computed = self.shared = 0

    def read(self, pool: PagePool) -> SegmentRead:
        """How a step reads what is computed so far."""
        return SegmentRead(tuple(self.pages[: pool.pages_for(self.computed)]), self.computed)
