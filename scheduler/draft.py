"""A step while it is being planned: its entries so far, what they read, and what they are predicted to cost.

Adding an entry *is* the decision to compute it: pages are taken and the segment's `computed` advances at
once, so that the next candidate is priced against what this step will really hold.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.live_request import Branch, LiveRequest
from scheduler.pages import PagePool
from scheduler.plan import Entry, SlotSetup
from scheduler.predictor import StepLatencyModel
from scheduler.segment import Segment


class StepDraft:
    """Entries of one step, within the largest bucket.

    make_room(draft, live, pages)  frees pages for a request that must advance, or returns False
    take_slot(draft)               a device slot that no entry of this step uses
    """

    def __init__(
        self,
        step_id: int,
        pool: PagePool,
        latency: StepLatencyModel,
        make_room: Callable[[StepDraft, LiveRequest, int], bool],
        take_slot: Callable[[StepDraft], int],
    ) -> None:
        self.step_id = step_id
        self.rows = 0
        self.kv_tokens = 0
        self.entries: list[Entry] = []
        self.slots: list[SlotSetup] = []
        self.advanced: dict[str, list[Branch]] = {}
        self._pool = pool
        self._latency = latency
        self._make_room = make_room
        self._take_slot = take_slot
        self._pages_read: set[int] = set()
        self._segments_read: set[Segment] = set()
        self._sampled: set[Branch] = set()

    @property
    def room(self) -> int:
        """Rows that still fit the largest bucket."""
        return self._latency.buckets.largest - self.rows

    def seconds(self, rows: int = 0, kv_tokens: int = 0) -> float:
        """Predicted seconds of the step, with so much more in it."""
        return self._latency.predict(max(1, self.rows + rows), self.kv_tokens + kv_tokens)

    def unread(self, branch: Branch) -> int:
        """KV positions that `branch` would read and nobody in the step reads yet."""
        segments = (*branch.segment.ancestors, branch.segment)
        return sum(self._unread(segment) for segment in segments if segment not in self._segments_read)

    def affordable(self, branch: Branch, rows: int, budget: float) -> int:
        """The most of `rows` rows of `branch` with which the step stays within `budget`."""
        kv_tokens = self.unread(branch)
        for bucket in reversed([*self._latency.buckets]):
            fit = min(rows, bucket - self.rows)
            if fit > 0 and self._latency.predict(bucket, self.kv_tokens + kv_tokens + fit) <= budget:
                return fit
        return 0

    def left(self, branch: Branch) -> int:
        """Rows that `branch` could still add: none once the step samples its next token."""
        return 0 if branch in self._sampled else branch.backlog

    def rows_of(self, live: LiveRequest) -> int:
        return sum(entry.rows for entry in self.entries if entry.request_id == live.request.id)

    def add(self, live: LiveRequest, branch: Branch, max_rows: int, *, must: bool = False) -> int:
        """Advance `branch` by up to `max_rows` rows; returns how many. `must`: others may be preempted."""
        added = 0
        assert branch not in self._sampled
        for segment, wanted in branch.pieces():
            rows = self._with_pages(live, segment, min(wanted, max_rows - added, self.room), must)
            if rows > 0:
                self._append(
                    live, branch, segment, rows, samples=segment is branch.segment and rows == wanted
                )
                added += rows
            if rows < wanted:
                break
        if added:
            branch.last_advanced = self.step_id
            advanced = self.advanced.setdefault(live.request.id, [])
            if branch not in advanced:
                advanced.append(branch)
        return added

    def _with_pages(self, live: LiveRequest, segment: Segment, rows: int, must: bool) -> int:
        """Take the pages for `rows` more positions of `segment`; fewer rows if there are not enough."""
        if rows <= 0:
            return 0
        pool = self._pool
        missing = pool.pages_for(segment.computed + rows) - len(segment.pages)
        if missing > pool.available and not (must and self._make_room(self, live, missing)):
            missing = pool.available
            rows = min(rows, (len(segment.pages) + missing) * pool.page_size - segment.computed)
        if missing > 0:
            segment.pages += pool.allocate(missing)
        return rows

    def _append(self, live: LiveRequest, branch: Branch, segment: Segment, rows: int, samples: bool) -> None:
        if samples and branch.slot is None:
            self.slots.append(live.slot_setup(branch, self._take_slot(self)))
        ordinal = segment.computed
        tokens = tuple(segment.tokens[ordinal : ordinal + rows])
        self._read(segment.ancestors)
        segment.computed += rows
        self.kv_tokens += rows if segment in self._segments_read else self._unread(segment)
        self._segments_read.add(segment)
        self._pages_read.update(segment.pages)
        entry = Entry(
            request_id=live.request.id,
            branch=branch.id,
            segment=segment.id,
            slot=branch.slot if samples else None,
            start=segment.start + ordinal,
            ordinal=ordinal,
            rows=rows,
            tokens=tokens or None,
            context=tuple(ancestor.read(self._pool) for ancestor in segment.ancestors),
            own=segment.read(self._pool),
            samples=samples,
            path=branch.path,
        )
        if samples:
            branch.in_flight.append(entry)
            self._sampled.add(branch)
        self.entries.append(entry)
        self.rows += rows

    def _read(self, segments: tuple[Segment, ...]) -> None:
        for segment in segments:
            if segment not in self._segments_read:
                self.kv_tokens += self._unread(segment)
                self._segments_read.add(segment)
                self._pages_read.update(segment.pages)

    def _unread(self, segment: Segment) -> int:
        """Positions of `segment` that are not on pages which the step reads already for another request."""
        shared = sum(page in self._pages_read for page in segment.pages[: segment.shared])
        return segment.computed - shared * self._pool.page_size
