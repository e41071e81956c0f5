"""A step while it is being planned: its entries so far, what they read, and what they are predicted to cost.

Adding an entry *is* the decision to compute it: pages are taken and the segment's `computed` advances at
once, so that the next candidate is priced against what this step will really hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scheduler.branch import Branch
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.plan import Entry, SegmentRead, SlotSetup
from scheduler.predictor import StepLatencyModel
from scheduler.segment import Segment


class StepDraft:
    """Entries of one step, one for each segment that is written, within the largest bucket.

    start      when the step should begin
    baseline   predicted seconds of its forced part, once that is in; budget, what it may take with the rest
    advanced   the branches that advance, and by how many rows
    sampling   the requests that it should give a token

    make_room(draft, live, pages)  frees pages for a request that must advance, or returns False
    take_slot()                    a device slot that no entry of this step uses
    """

    def __init__(
        self,
        step_id: int,
        start: float,
        pool: PagePool,
        latency: StepLatencyModel,
        *,
        make_room: Callable[[StepDraft, LiveRequest, int], bool],
        take_slot: Callable[[], int],
    ) -> None:
        self.step_id = step_id
        self.start = start
        self.baseline = 0.0
        self.budget = math.inf
        self.rows = 0
        self.kv_tokens = 0
        self.slots: list[SlotSetup] = []
        self.advanced: dict[LiveRequest, dict[Branch, int]] = {}
        self.sampling: set[LiveRequest] = set()
        self._pool = pool
        self._page_size = pool.page_size
        self._latency = latency
        self._largest = latency.buckets.largest
        self._make_room = make_room
        self._take_slot = take_slot
        self._entries: dict[Segment, Entry] = {}
        self._contexts: dict[tuple[Segment, ...], tuple[SegmentRead, ...]] = {}
        self._segments_read: set[Segment] = set()
        self._shared_pages_read: set[int] = set()
        self._sampled: set[Branch] = set()

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    @property
    def bucket(self) -> int:
        return self._latency.buckets.fit(self.rows)

    @property
    def room(self) -> int:
        """Rows that still fit the largest bucket."""
        return self._largest - self.rows

    def rows_of(self, live: LiveRequest) -> int:
        return sum(self.advanced.get(live, {}).values())

    def left(self, branch: Branch) -> int:
        """Rows that `branch` could still add: none once the step samples its next token."""
        return 0 if branch in self._sampled else branch.backlog

    # --- what it costs ---------------------------------------------------------------------------------

    def seconds(self, kv_tokens: int = 0) -> float:
        """Predicted seconds of the step, with so much more KV to read."""
        return self._latency.predict(max(1, self.rows), self.kv_tokens + kv_tokens)

    def unread(self, branch: Branch) -> int:
        """KV positions that `branch` would read and nobody in the step reads yet."""
        unread = 0
        for segment in branch.segment.chain:
            if segment not in self._segments_read:
                unread += self._unread(segment)
        return unread

    def affordable(self, branch: Branch, rows: int) -> int:
        """The most of `rows` rows of `branch` with which the step stays within the budget."""
        kv_tokens = self.kv_tokens + self.unread(branch)
        for bucket in reversed([*self._latency.buckets]):
            fit = min(rows, bucket - self.rows)
            if fit > 0 and self._latency.predict(bucket, kv_tokens + fit) <= self.budget:
                return fit
        return 0

    def _unread(self, segment: Segment) -> int:
        """Positions of `segment` that are not on pages which the step reads already for another request."""
        if not segment.shared:
            return segment.computed
        known = self._shared_pages_read.intersection(segment.pages[: segment.shared])
        return segment.computed - len(known) * self._page_size

    def _read(self, segment: Segment) -> None:
        self.kv_tokens += self._unread(segment)
        self._segments_read.add(segment)
        self._shared_pages_read.update(segment.pages[: segment.shared])

    # --- what it holds ---------------------------------------------------------------------------------

    def add(self, live: LiveRequest, branch: Branch, max_rows: int, *, must: bool = False) -> int:
        """Advance `branch` by up to `max_rows` rows; returns how many. `must`: others may be preempted."""
        assert branch not in self._sampled
        added = 0
        for segment, wanted in branch.pieces():
            rows = self._with_pages(live, segment, min(wanted, max_rows - added, self.room), must)
            if rows > 0:
                samples = segment is branch.segment and rows == wanted
                self._append(live, branch, segment, rows, samples)
                added += rows
            if rows < wanted:
                break
        if added:
            branch.last_advanced = self.step_id
            rows_of = self.advanced.setdefault(live, {})
            rows_of[branch] = rows_of.get(branch, 0) + added
        return added

    def _with_pages(self, live: LiveRequest, segment: Segment, rows: int, must: bool) -> int:
        """Take the pages for `rows` more positions of `segment`; fewer rows if there are not enough."""
        if rows <= 0:
            return 0
        if segment.computed + rows <= len(segment.pages) * self._page_size:
            return rows
        pool = self._pool
        missing = pool.pages_for(segment.computed + rows) - len(segment.pages)
        if missing > pool.available and not (must and self._make_room(self, live, missing)):
            missing = pool.available
            rows = min(rows, (len(segment.pages) + missing) * self._page_size - segment.computed)
        if missing:
            segment.pages.extend(pool.allocate(missing))
        return rows

    def _append(self, live: LiveRequest, branch: Branch, segment: Segment, rows: int, samples: bool) -> None:
        if samples and branch.slot is None:
            self.slots.append(live.slot_setup(branch, self._take_slot()))
        before = segment.computed
        segment.computed += rows
        self.rows += rows
        context = self._context(segment.ancestors)
        if segment in self._segments_read:
            self.kv_tokens += rows
        else:
            self._read(segment)
        begun = self._entries.get(segment)
        ordinal = before if begun is None else begun.ordinal
        entry = Entry(
            request_id=live.request.id,
            branch=branch.id,
            segment=segment.id,
            slot=branch.slot if samples else None,
            start=segment.start + ordinal,
            ordinal=ordinal,
            rows=segment.computed - ordinal,
            tokens=tuple(segment.tokens[ordinal : segment.computed]) or None,
            context=context,
            own=segment.read(self._pool),
            samples=samples,
            path=branch.path,
        )
        self._entries[segment] = entry
        if samples:
            branch.in_flight.append(entry)
            self._sampled.add(branch)
            self.sampling.add(live)

    def _context(self, ancestors: tuple[Segment, ...]) -> tuple[SegmentRead, ...]:
        """How the step reads `ancestors`, all of which are computed by now."""
        context = self._contexts.get(ancestors)
        if context is None:
            for segment in ancestors:
                if segment not in self._segments_read:
                    self._read(segment)
            context = self._contexts[ancestors] = tuple(segment.read(self._pool) for segment in ancestors)
        return context
