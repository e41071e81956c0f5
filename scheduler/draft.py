"""A step while it is being planned: its entries so far, what they read, and what they are predicted to cost.

Adding an entry *is* the decision to compute it: pages are taken and the segment's `computed` advances at
once, so that the next candidate is priced against what this step will really hold.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from scheduler.branch import Branch
from scheduler.live_request import LiveRequest
from scheduler.pages import PagePool
from scheduler.predictor import StepLatencyModel, StepLoad
from scheduler.segment import Segment
from scheduler.step import Entry, Forecast, ScheduledStep, SegmentRead, SlotSetup, Step

# Named tuples from all of their fields, in half the time that their own constructors take.
_entry = partial[Entry](tuple.__new__, Entry)  # type: ignore[reportUnknownMemberType]
_segment_read = partial[SegmentRead](tuple.__new__, SegmentRead)  # type: ignore[reportUnknownMemberType]


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
        self.slots: list[SlotSetup] = []
        self.advanced: dict[LiveRequest, dict[Branch, int]] = {}
        self.sampling: set[LiveRequest] = set()
        self._pool = pool
        self._page_size = pool.page_size
        self._latency = latency
        self._largest = latency.buckets.largest
        self._make_room = make_room
        self._take_slot = take_slot
        self._shared_kv = self._private_kv = self._chunk_context = self._raw_kv = 0
        self._entries: dict[Segment, Entry] = {}
        self._contexts: dict[tuple[Segment, ...], _Context] = {}
        self._segments_read: set[Segment] = set()
        self._prefixes_read = PrefixesRead()
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

    def schedule(self, deferred: tuple[tuple[str, int], ...]) -> ScheduledStep:
        """The step, and what is expected of it."""
        step = Step(self.step_id, self.entries, tuple(self.slots), self.bucket)
        forecast = Forecast(self.load, self.seconds(), self.baseline, self.budget, deferred)
        return ScheduledStep(step, forecast)

    # --- what it costs ---------------------------------------------------------------------------------

    @property
    def load(self) -> StepLoad:
        return StepLoad(
            self.rows,
            self._shared_kv,
            self._private_kv,
            len(self._segments_read),
            self._chunk_context,
            self._raw_kv,
        )

    def seconds(self) -> float:
        """Predicted seconds of the step."""
        return self._latency.predict(self.load)

    def added(self, branch: Branch, rows: int) -> StepLoad:
        """What `rows` rows of `branch` would add to the step, as if it came alone."""
        segment, ancestors = branch.segment, branch.segment.ancestors
        context = self._contexts.get(ancestors)
        shared, items, length = 0, 0, 0
        if context is not None:
            length = context.length
        else:
            for ancestor in ancestors:
                length += len(ancestor.tokens)
                if ancestor not in self._segments_read:
                    shared += self._unread(ancestor)
                    items += 1
        own = rows
        if segment not in self._segments_read:
            own += self._unread(segment)
            items += 1
        before = length + segment.computed
        return StepLoad(rows, shared, own, items, _seen(before + 1, rows - 1), before + rows)

    def prices(self, branches: Sequence[Branch]) -> list[tuple[int, float]]:
        """Of each: its rows, and predicted seconds that it would add beside them, as if it came alone."""
        prices: list[tuple[int, float]] = []
        ancestors, line = None, None
        for branch in branches:
            segment = branch.segment
            rows = 1 if branch.in_flight else branch.backlog
            if segment.ancestors is not ancestors:  # siblings share them
                ancestors = segment.ancestors
                context = self._contexts.get(ancestors)
                line = None if context is None else self._latency.row_line(context.length)
            if rows == 1 and line is not None and not segment.shared:
                price = line[0] + line[1] * (segment.computed + 1)
            else:
                price = self._latency.reading_seconds(self.added(branch, rows))
            prices.append((rows, price))
        return prices

    def affordable(self, branch: Branch, rows: int) -> int:
        """The most of `rows` rows of `branch` with which the step stays within the budget."""
        latency, budget = self._latency, self.budget - self._latency.reading_seconds(self.load)

        def exceeds(count: int) -> bool:
            reading = latency.reading_seconds(self.added(branch, count))
            return latency.rows_seconds(self.rows + count) + reading > budget

        most = min(rows, self.room)
        if most <= 0 or exceeds(1):
            return 0
        return most if not exceeds(most) else bisect_left(range(most), True, lo=1, key=exceeds) - 1

    def _unread(self, segment: Segment) -> int:
        """Positions of `segment` that are not on pages which the step reads already for another request."""
        if not segment.shared:
            return segment.computed
        known = self._prefixes_read.known(segment.pages, segment.shared)
        return segment.computed - known * self._page_size

    def _read(self, segment: Segment) -> int:
        """Mark `segment` as read; returns its positions that nobody read before."""
        self._segments_read.add(segment)
        if not segment.shared:
            return segment.computed
        known = self._prefixes_read.add(segment.pages, segment.shared)
        return segment.computed - known * self._page_size

    # --- what it holds ---------------------------------------------------------------------------------

    def add(self, live: LiveRequest, branch: Branch, max_rows: int, *, must: bool = False) -> int:
        """Advance `branch` by up to `max_rows` rows; returns how many. `must`: others may be preempted."""
        assert branch not in self._sampled
        segment = branch.segment
        if max_rows > 0 and branch.is_decoding and segment not in self._entries and self.rows < self._largest:
            has_page = segment.computed < len(segment.pages) * self._page_size
            added = 1 if has_page else self._with_pages(live, segment, 1, must)
            if added:
                self._append_row(live, branch, segment)
        else:
            added = self._add_pieces(live, branch, max_rows, must)
        if added:
            branch.last_advanced = self.step_id
            rows_of = self.advanced.get(live)
            if rows_of is None:
                self.advanced[live] = {branch: added}
            else:
                rows_of[branch] = rows_of.get(branch, 0) + added
        return added

    def _add_pieces(self, live: LiveRequest, branch: Branch, max_rows: int, must: bool) -> int:
        """As `add`, of anything: missing ancestors, chunks, and what another entry of the step began."""
        added = 0
        for segment, wanted in branch.pieces():
            rows = self._with_pages(live, segment, min(wanted, max_rows - added, self.room), must)
            if rows > 0:
                samples = segment is branch.segment and rows == wanted
                self._append(live, branch, segment, rows, samples)
                added += rows
            if rows < wanted:
                break
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

    def _append_row(self, live: LiveRequest, branch: Branch, segment: Segment) -> None:
        """As `_append`, of most rows there are: the first one of its segment, and it samples."""
        slot = branch.slot
        if slot is None:
            slot = self._take_slot()
            self.slots.append(live.slot_setup(branch, slot))
        ordinal = segment.computed
        segment.computed = filled = ordinal + 1
        self.rows += 1
        context = self._contexts.get(segment.ancestors) or self._context(segment.ancestors)
        if segment in self._segments_read:
            self._private_kv += 1
        elif segment.shared:
            self._private_kv += self._read(segment)
        else:
            self._segments_read.add(segment)
            self._private_kv += filled
        self._raw_kv += context.length + filled
        tokens = segment.tokens
        row = (
            live.request.id,
            branch.id,
            segment.id,
            slot,
            segment.start + ordinal,
            ordinal,
            1,
            (tokens[ordinal],) if ordinal < len(tokens) else None,
            context.reads,
            _segment_read((segment.pages[: -(-filled // self._page_size)], filled)),
            True,
            branch.path,
        )
        entry = self._entries[segment] = _entry(row)
        branch.in_flight.append(entry)
        self._sampled.add(branch)
        self.sampling.add(live)

    def _append(self, live: LiveRequest, branch: Branch, segment: Segment, rows: int, samples: bool) -> None:
        if samples and branch.slot is None:
            self.slots.append(live.slot_setup(branch, self._take_slot()))
        before = segment.computed
        segment.computed += rows
        self.rows += rows
        context = self._contexts.get(segment.ancestors) or self._context(segment.ancestors)
        self._private_kv += rows if segment in self._segments_read else self._read(segment)
        begun = self._entries.get(segment)
        ordinal = before if begun is None else begun.ordinal
        seen = context.length + before
        self._raw_kv += rows if begun is not None else seen + rows
        if begun is not None:
            self._chunk_context += _seen(seen, rows)
        elif rows > 1:
            self._chunk_context += _seen(seen + 1, rows - 1)
        tokens = segment.tokens[ordinal : segment.computed] if ordinal < len(segment.tokens) else None
        entry = Entry(
            live.request.id,
            branch.id,
            segment.id,
            branch.slot if samples else None,
            segment.start + ordinal,
            ordinal,
            segment.computed - ordinal,
            tuple(tokens) if tokens else None,
            context.reads,
            segment.read(self._pool),
            samples,
            branch.path,
        )
        self._entries[segment] = entry
        if samples:
            branch.in_flight.append(entry)
            self._sampled.add(branch)
            self.sampling.add(live)

    def _context(self, ancestors: tuple[Segment, ...]) -> _Context:
        """How the step reads `ancestors`, all of which are computed by now."""
        for segment in ancestors:
            if segment not in self._segments_read:
                self._shared_kv += self._read(segment)
        reads = tuple([segment.read(self._pool) for segment in ancestors])
        context = self._contexts[ancestors] = _Context(reads, sum([read.length for read in reads]))
        return context


def _seen(before: int, rows: int) -> int:
    """Positions that consecutive rows see in all, the first of them after `before` positions."""
    return rows * before + rows * (rows + 1) // 2


class PrefixesRead:
    """The pages of the prefix cache that a step reads, as runs of them that begin where a prompt does.

    In front of a page of the cache there is always the same prefix. So of a run's pages the first ones are
    known, if any are; and a run whose first page is new is known by that page alone, until another one begins
    like it.
    """

    def __init__(self) -> None:
        self._alone: dict[int, tuple[Sequence[int], int] | None] = {}  # runs by their first page
        self._pages: set[int] = set()  # of the runs that are not alone

    def known(self, pages: Sequence[int], count: int) -> int:
        """How many of the first `count` pages (at least one) are in a run that was added."""
        first, listed = pages[0], self._pages
        if first not in self._alone:
            return 0
        alone = self._alone[first]
        if alone is not None:
            listed.update(alone[0][: alone[1]])
            self._alone[first] = None
        return bisect_left(range(count), True, key=lambda index: pages[index] not in listed)

    def add(self, pages: Sequence[int], count: int) -> int:
        """Add the run of the first `count` pages; returns how many of them were known."""
        known = self.known(pages, count)
        if known:
            self._pages.update(pages[known:count])
        else:
            self._alone[pages[0]] = (pages, count)
        return known


class _Context(NamedTuple):
    """Ancestors of a segment as the step reads them, and their positions in all."""

    reads: tuple[SegmentRead, ...]
    length: int
