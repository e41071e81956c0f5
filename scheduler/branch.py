"""One sequence being decoded: a request's trunk, or a branch of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scheduler.cursor import Cursor, Fork
from scheduler.events import BranchInfo
from scheduler.sampling import SamplingParams
from scheduler.search import Match, Search
from scheduler.segment import Segment, text
from scheduler.step import Entry
from scheduler.stopping import FinishReason, Stopping

Standing = tuple[int, int]
"""What the branches of a race are compared by: tokens on the longest chain, and the place in the fork."""


class Branch:
    """Where a sequence stands: in its program, in its segments, and on the device.

    segment        what it writes; the segment's ancestors are what it reads besides
    trail          its own segments since birth, oldest first, with those of branches joined into it by `kv`
    stage          number of the stage that it is in, or was in last
    stage_from     index in the segment of the stage's first sampled token
    search         for the stage's stop strings, if it has any
    complete       leading ancestors of the segment that are known to be computed as a whole
    limit          first position that the stage may not fill
    in_flight      launched entries whose sampled token has not come back, oldest first
    slot           where the device keeps its last token and sampling parameters, while it has one
    last_advanced  the step in which it last ran, for taking turns
    critical       sampled tokens on the longest chain from the request's start to here
    allowance      pages that the branch and those below it may hold, for model-driven forks
    fork           the fork that it waits for; `forked` are its branches, `open_children` of which still run
    ended          why it ended, and at which stop; None before
    bar            in a race: the standing that a branch must not be behind, once k of them have ended
    lent           the last tokens (none or one) that these begin with in its place, as (ids, generated?)
    """

    __slots__ = (
        "allowance", "bar", "complete", "completion_tokens", "critical", "cursor", "ended", "fork", "forked",
        "id", "in_flight", "label", "last_advanced", "lent", "limit", "open_children", "parent", "path",
        "sampling", "search", "segment", "slot", "stage", "stage_from", "stopping", "trail",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        parent: Branch | None,
        path: tuple[tuple[int, int], ...],
        label: str,
        cursor: Cursor,
        segment: Segment,
    ) -> None:
        self.id = id
        self.parent = parent
        self.path = path
        self.label = label
        self.cursor = cursor
        self.segment = segment
        self.trail = [segment]
        self.stopping = Stopping(max_tokens=0)
        self.sampling = SamplingParams()
        self.stage = 0
        self.stage_from = 0
        self.search: Search | None = None
        self.complete = 0
        self.limit = 0
        self.in_flight: list[Entry] = []
        self.slot: int | None = None
        self.last_advanced = -1
        self.completion_tokens = 0
        self.critical = 0 if parent is None else parent.critical
        self.allowance = 0
        self.fork: Fork | None = None
        self.forked: list[Branch] = []
        self.open_children = 0
        self.ended: tuple[FinishReason, int | Match | None] | None = None
        self.bar: Standing | None = None
        self.lent: tuple[Sequence[int], Sequence[int]] = ((), ())

    def info(self, prefix: tuple[int, ...]) -> BranchInfo:
        return BranchInfo(self.id, self.parent.id if self.parent else 0, self.label, prefix)

    def tree(self) -> Iterator[Branch]:
        """Itself, the branches that it waits for, and those that these wait for; those that ended, too."""
        yield self
        for child in self.forked:
            yield from child.tree()

    @property
    def races(self) -> bool:
        """Whether siblings can outrun it, until they are joined."""
        fork = self.parent.fork if self.parent else None
        return fork is not None and fork.is_race

    @property
    def backlog(self) -> int:
        """Rows until this branch samples its next token; 0 while it waits.

        It waits for its children, or for a token that is still on the way and that it cannot feed from its
        slot.
        """
        segment = self.segment
        if self.in_flight:
            ends = segment.start + len(segment.tokens) + len(self.in_flight) >= self.limit
            return 0 if ends or self.slot is None else 1
        if self.open_children:
            return 0
        if self.complete == len(segment.ancestors):
            return segment.missing
        return sum(ancestor.missing for ancestor in self._incomplete())

    @property
    def is_decoding(self) -> bool:
        """Whether all that it lacks is the one row which samples its next token; then `backlog` is 1."""
        segment = self.segment
        if self.in_flight:
            position = segment.start + len(segment.tokens) + len(self.in_flight)
            return self.slot is not None and position < self.limit
        if self.open_children or self.complete < len(segment.ancestors):
            return False
        return len(segment.tokens) - segment.computed == 1

    def pieces(self) -> list[tuple[Segment, int]]:
        """What must be computed, in order, until this branch samples its next token: (segment, rows).

        Missing ancestors come first: a parent's last token, or all of it after a preemption.
        """
        backlog = self.backlog
        if self.in_flight:
            return [(self.segment, 1)] if backlog else []
        return [(segment, segment.missing) for segment in self._incomplete() if backlog and segment.missing]

    def _incomplete(self) -> tuple[Segment, ...]:
        """The end of the chain, from the first ancestor on that is not computed as a whole.

        Ancestors never grow, so that those once complete are passed over until they lose their pages.
        """
        ancestors = self.segment.ancestors
        while self.complete < len(ancestors) and not ancestors[self.complete].missing:
            self.complete += 1
        return (*ancestors[self.complete :], self.segment)

    def history(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before the next sampled token, as (given, generated)."""
        tokens, sampled = text(self.segment.chain)
        given = tuple(token for token, made in zip(tokens, sampled, strict=True) if not made)
        generated = tuple(token for token, made in zip(tokens, sampled, strict=True) if made)
        return given, generated
