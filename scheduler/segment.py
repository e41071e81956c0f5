"""A segment: a run of KV pages that a set of query rows reads; a node of a request's tree.

    tokens     [0 ................ computed) [computed ..... len(tokens))   then tokens still in flight
    KV         written by launched steps     not yet fed

A segment starts on a fresh page (or on shared, full, cached ones), so any number of segments can follow it.
Its ancestors are fixed at birth: a replay after a preemption reads exactly what the first run read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

from scheduler.pages import PagePool
from scheduler.step import SegmentRead


class Segment:
    """Token ids, where they stand, and the pages of those that are computed.

    start     rotary position of the first token
    lead      where a fork's branches all begin with the fork's last token: the segment that gave it up
    sampled   for each token, whether it was generated (1) or given (0)
    shared    leading pages that are in the prefix cache: full ones, which are never written again
    """

    __slots__ = (
        "ancestors",
        "computed",
        "id",
        "lead",
        "pages",
        "sampled",
        "shared",
        "start",
        "tokens",
    )

    def __init__(self, id: int, start: int, ancestors: tuple[Segment, ...], lead: int | None = None) -> None:
        self.id = id
        self.start = start
        self.ancestors = ancestors
        self.lead = lead
        self.tokens: list[int] = []
        self.sampled = bytearray()
        self.pages = array("i")
        self.computed = 0
        self.shared = 0

    @property
    def chain(self) -> tuple[Segment, ...]:
        """Its ancestors, root first, and itself. (Kept, this would be a cycle: only a full collection of
        garbage would free the tokens of a request that has ended.)"""
        return (*self.ancestors, self)

    @property
    def end(self) -> int:
        """Rotary position of the next token."""
        return self.start + len(self.tokens)

    @property
    def missing(self) -> int:
        """Known tokens whose KV no launched step writes."""
        return max(0, len(self.tokens) - self.computed)

    def extend(self, tokens: Sequence[int], sampled: Iterable[int] | None = None) -> None:
        """Append tokens: given ones, unless `sampled` says of each whether it was generated."""
        self.tokens.extend(tokens)
        self.sampled.extend(bytes(len(tokens)) if sampled is None else sampled)

    def append(self, token: int) -> None:
        """Append a generated token."""
        self.tokens.append(token)
        self.sampled.append(True)

    def cut(self, length: int, pool: PagePool) -> None:
        """Keep the first `length` tokens. What was written beyond is never read: readers count positions."""
        del self.tokens[length:], self.sampled[length:]
        self.computed = min(self.computed, length)
        self.shared = min(self.shared, length // pool.page_size)
        keep = pool.pages_for(length)
        pool.release(self.pages[keep:])
        self.pages = self.pages[:keep]

    def drop(self, pool: PagePool) -> None:
        """Give up the pages; the tokens can be replayed."""
        pool.release(self.pages)
        self.pages = array("i")
        self.computed = self.shared = 0

    def read(self, pool: PagePool) -> SegmentRead:
        """How a step reads what is computed so far."""
        return SegmentRead(self.pages[: -(-self.computed // pool.page_size)], self.computed)


def newest_first(segments: Sequence[Segment]) -> Iterator[int]:
    """The tokens of `segments` from the last to the first."""
    for segment in reversed(segments):
        yield from reversed(segment.tokens)


def text(segments: Iterable[Segment]) -> tuple[list[int], bytearray]:
    """The tokens of `segments` end to end, and which of them were generated.

    A fork's last token that several of them begin with counts once.
    """
    tokens: list[int] = []
    sampled = bytearray()
    leads: set[int] = set()
    for segment in segments:
        first = int(segment.lead in leads)
        if segment.lead is not None and segment.tokens:
            leads.add(segment.lead)
        tokens += segment.tokens[first:]
        sampled += segment.sampled[first:]
    return tokens, sampled
