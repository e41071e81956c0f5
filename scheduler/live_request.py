"""The live state of one request: its tree of branches and segments, and what each token does to it.

A request is a trunk (branch 0) that may fork into branches, which may fork again. A branch decodes into its
own segment and reads the segments of its ancestors. Everything here follows from tokens that came back; what
runs in which step is decided in `scheduler.scheduler`.
"""

from __future__ import annotations

import itertools

from scheduler.events import (
    BranchInfo,
    Event,
    Finished,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    Timing,
    TokenEmitted,
    Usage,
)
from scheduler.footprint import worst_case_pages
from scheduler.pages import PagePool
from scheduler.plan import Entry, Sample, SlotSetup
from scheduler.program import Action, Codec, Cursor, Decode, End, Fork, TagProgram, cursor
from scheduler.request import FinishReason, Request, SamplingParams, Stopping
from scheduler.segment import Segment


class Branch:
    """One sequence being decoded.

    segment        what it writes; the segment's ancestors are what it reads besides
    trail          its own segments since birth, oldest first, with those of branches joined into it by `kv`
    stage_from     index in the segment of the stage's first sampled token
    limit          first position that the stage may not fill
    in_flight      launched entries whose sampled token has not come back, oldest first
    slot           where the device keeps its last token and sampling parameters, while it has one
    last_advanced  the step in which it last ran, for taking turns
    critical       sampled tokens on the longest chain from the request's start to here
    allowance      pages that the branch and those below it may hold, for model-driven forks
    """

    __slots__ = (
        "allowance", "completion_tokens", "critical", "cursor", "fork", "fork_stage", "forked", "id",
        "in_flight", "label", "last_advanced", "limit", "open_children", "parent", "path", "sampling",
        "segment", "slot", "stage", "stage_from", "stopping", "trail",
    )  # fmt: skip

    def __init__(
        self, id: int, parent: Branch | None, path: tuple[tuple[int, int], ...], label: str, cursor: Cursor
    ) -> None:
        self.id = id
        self.parent = parent
        self.path = path
        self.label = label
        self.cursor = cursor
        self.segment: Segment
        self.trail: list[Segment] = []
        self.stopping = Stopping(max_tokens=0)
        self.sampling = SamplingParams()
        self.stage = 0
        self.stage_from = 0
        self.limit = 0
        self.in_flight: list[Entry] = []
        self.slot: int | None = None
        self.last_advanced = 0
        self.completion_tokens = 0
        self.critical = 0 if parent is None else parent.critical
        self.allowance = 0
        self.fork: Fork | None = None
        self.fork_stage = 0
        self.forked: list[Branch] = []
        self.open_children = 0

    def info(self, prefix: tuple[int, ...]) -> BranchInfo:
        return BranchInfo(self.id, self.parent.id if self.parent else 0, self.label, prefix)

    def pieces(self) -> list[tuple[Segment, int]]:
        """What must be computed, in order, until this branch samples its next token: (segment, rows).

        Missing ancestors come first (a parent's last token, or all of it after a preemption). Empty while
        the branch waits for its children, or for a token that is still on the way and that it cannot feed
        from its slot.
        """
        if self.open_children:
            return []
        if self.in_flight:
            waits = self.slot is None or self.segment.end + len(self.in_flight) >= self.limit
            return [] if waits else [(self.segment, 1)]
        missing = [(s, s.missing) for s in (*self.segment.ancestors, self.segment)]
        return [(segment, rows) for segment, rows in missing if rows]

    @property
    def backlog(self) -> int:
        """Rows until this branch samples its next token."""
        return sum(rows for _, rows in self.pieces())

    def history(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before the next sampled token, as (given, generated), each sequence's tokens once."""
        given: list[int] = []
        generated: list[int] = []
        for segment in (*self.segment.ancestors, self.segment):
            own = zip(segment.tokens[segment.lead :], segment.sampled[segment.lead :], strict=True)
            for token, sampled in own:
                (generated if sampled else given).append(token)
        return tuple(given), tuple(generated)


class LiveRequest:
    """A request from its arrival to its last token."""

    def __init__(
        self,
        request: Request,
        *,
        now: float,
        pool: PagePool,
        codec: Codec,
        free_slots: list[int],
        max_context: int,
    ) -> None:
        self.request = request
        self.age = 0  # order of first start: the oldest running request is never preempted
        self.arrival = now
        self.started_at: float | None = None
        self.first_token: float | None = None
        self.last_token = now
        self.updated_at = now
        self.resumed_at = now  # for control only: measures never restart
        self.tokens = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self.finished = False
        self.reported_width: tuple[int, int] = (1, 1)
        self.branches: dict[int, Branch] = {}
        self.segments: dict[int, Segment] = {}
        self.worst_case_pages = worst_case_pages(request, pool.page_size)
        self._pool = pool
        self._codec = codec
        self._free_slots = free_slots
        self._max_context = max_context
        self._segment_ids = itertools.count()
        self._branch_ids = itertools.count()
        self._stages = itertools.count()
        self._root: Segment | None = None
        self._published: bytes | None = None  # key of the last page given to the prefix cache
        self._unsent: list[Event] = []

    # --- what the scheduler asks -----------------------------------------------------------------------

    @property
    def ttft_deadline(self) -> float:
        return self.arrival + self.request.slo.ttft

    @property
    def reading_deadline(self) -> float:
        """When what it has to read should be read: the TTFT target, counted anew after a preemption."""
        return (self.arrival if self.first_token is None else self.resumed_at) + self.request.slo.ttft

    def deadline(self, emission: float | None = None) -> float:
        """When the next token is due: after the last one (or the one expected at `emission`)."""
        last = max(self.last_token, self.resumed_at) if emission is None else emission
        return last + self.request.slo.tpot

    def runnable(self) -> list[Branch]:
        """Branches that could advance, the least recently advanced first."""
        ready = [branch for branch in self.branches.values() if branch.pieces()]
        return sorted(ready, key=lambda branch: (branch.last_advanced, branch.id))

    # --- coming and going ------------------------------------------------------------------------------

    def resume(self, now: float) -> None:
        """Leave the queue: for the first time, or again after a preemption."""
        self.resumed_at = now
        if self._root is None:
            self.started_at = now
            root = self._root = self._new_segment(0, ())
            root.extend(self.request.prompt)
            trunk = Branch(next(self._branch_ids), None, (), "", cursor(self.request.program, self._codec))
            trunk.segment = root
            trunk.trail = [root]
            trunk.allowance = self._pool.num_pages
            self.branches[trunk.id] = trunk
            self._unsent += self._proceed(trunk, trunk.cursor.begin(root.end))
            self.cached_tokens = self._reuse_prefix(root)
        else:
            self._reuse_prefix(self._root)

    def preempt(self) -> None:
        """Give up all pages; every token is kept and replayed later."""
        self.preemptions += 1
        for segment in self.segments.values():
            segment.drop(self._pool)
        self._published = None
        for branch in self.branches.values():
            self.free_slot(branch)

    def drop_tail(self, branch: Branch) -> None:
        """Give up the pages of one branch's own segment."""
        branch.segment.drop(self._pool)
        if branch.segment is self._root:
            self._published = None
        self.free_slot(branch)

    def release(self) -> None:
        """Give back all pages and slots; what is still in flight will find nobody."""
        for segment in self.segments.values():
            segment.drop(self._pool)
        for branch in self.branches.values():
            self.free_slot(branch)
        self.segments.clear()
        self.branches.clear()
        self.finished = True

    def free_slot(self, branch: Branch) -> None:
        if branch.slot is not None:
            self._free_slots.append(branch.slot)
            branch.slot = None

    def slot_setup(self, branch: Branch, slot: int) -> SlotSetup:
        """Give `branch` a slot for the token that it samples next."""
        branch.slot = slot
        if not branch.sampling.uses_penalties:
            return SlotSetup(slot, branch.sampling)
        return SlotSetup(slot, branch.sampling, *branch.history())

    # --- tokens ----------------------------------------------------------------------------------------

    def accept(self, entry: Entry, sample: Sample, now: float) -> list[Event]:
        """A sampled token came back. A sample that the branch no longer waits for is dropped."""
        branch = self.branches.get(entry.branch)
        if branch is None or not branch.in_flight or branch.in_flight[0] is not entry:
            return []
        branch.in_flight.pop(0)
        self.updated_at = now
        events = self._first_events(now)
        stopping, segment = branch.stopping, branch.segment
        if sample.token in stopping.eos_ids or sample.token in stopping.stop_ids:
            reason = FinishReason.EOS if sample.token in stopping.eos_ids else FinishReason.STOP
            return events + self._end_stage(branch, branch.cursor.on_stop(reason), reason, sample.token)
        segment.extend((sample.token,), sampled=True)
        self.last_token = now
        self.tokens += 1
        branch.completion_tokens += 1
        branch.critical += 1
        events.append(TokenEmitted(self.request.id, branch.id, sample, branch.completion_tokens))
        generated = segment.tokens[branch.stage_from :]
        action = branch.cursor.on_token(generated, segment.end)
        if action is not None and self._fits(branch, action):
            reason = action.reason if isinstance(action, End) else FinishReason.FORKED
            return events + self._end_stage(branch, action, reason)
        stop = self._stop_string(stopping, generated)
        if stop is not None:
            action = branch.cursor.on_stop(FinishReason.STOP)
            return events + self._end_stage(branch, action, FinishReason.STOP, stop)
        if segment.end >= branch.limit:
            reason = FinishReason.CONTEXT if segment.end >= self._max_context else FinishReason.MAX_TOKENS
            return events + self._end_stage(branch, branch.cursor.on_stop(reason), reason)
        return events

    def publish_prefix(self) -> None:
        """Offer the full, computed pages of the trunk before its first fork to the prefix cache."""
        root = self._root
        if root is None or not root.pages:
            return
        full = min(root.computed, len(root.tokens)) // self._pool.page_size
        if full > root.shared:
            size = self._pool.page_size
            tokens = root.tokens[root.shared * size : full * size]
            for key in self._pool.cache.keys(tokens, self.request.cache_salt, self._published):
                self._pool.cache.insert(key, root.pages[root.shared])
                root.shared += 1
                self._published = key

    # --- stages ----------------------------------------------------------------------------------------

    def _first_events(self, now: float) -> list[Event]:
        if self.first_token is not None:
            return []
        self.first_token = self.last_token = now
        events, self._unsent = self._unsent, []
        return [Started(self.request.id, len(self.request.prompt), self.cached_tokens), *events]

    def _end_stage(
        self, branch: Branch, action: Action, reason: FinishReason, stop: int | str | None = None
    ) -> list[Event]:
        branch.in_flight.clear()
        branch.segment.cut(len(branch.segment.tokens), self._pool)
        self.free_slot(branch)
        final = isinstance(action, End)
        ended = StageFinished(
            self.request.id, branch.stage, branch.id, reason, stop, branch.completion_tokens, final
        )
        return [ended, *self._proceed(branch, action)]

    def _proceed(self, branch: Branch, action: Action) -> list[Event]:
        if isinstance(action, Decode):
            return self._decode(branch, action, self._open_stage((branch, action)))
        if isinstance(action, Fork):
            return self._fork(branch, action)
        return self._end_branch(branch)

    def _open_stage(self, *begun: tuple[Branch, Decode]) -> list[Event]:
        stage = next(self._stages)
        for branch, _ in begun:
            branch.stage = stage
        infos = tuple(branch.info(first.prefix) for branch, first in begun)
        return [StageStarted(self.request.id, stage, infos)]

    def _decode(self, branch: Branch, action: Decode, events: list[Event]) -> list[Event]:
        segment = branch.segment
        segment.extend(action.prefix)
        if segment.missing == 0:  # a token must be fed to sample the next: the last one, once more
            segment.computed -= 1
        branch.stopping = action.stopping
        branch.sampling = action.sampling or self.request.sampling
        branch.stage_from = len(segment.tokens)
        branch.limit = min(segment.end + action.stopping.max_tokens, self._max_context)
        if segment.end >= branch.limit:
            reason = FinishReason.CONTEXT
            return events + self._end_stage(branch, End(reason), reason)
        return events

    def _fork(self, parent: Branch, fork: Fork) -> list[Event]:
        """Branches start right after the parent's segment, on pages of their own, at a common position.

        Where a branch has nothing to begin with, the parent is sealed one token short, and each branch feeds
        that token as its own first row.
        """
        trunk = parent.segment
        shared_token = any(not child.first.prefix for child in fork.children)
        lead = trunk.tokens[-1:] if shared_token else []
        lead_sampled = bytes(trunk.sampled[-1:]) if shared_token else b""
        trunk.cut(len(trunk.tokens) - len(lead), self._pool)
        parent.fork, parent.forked, parent.open_children = fork, [], len(fork.children)
        share = self._share(parent, len(fork.children))
        ancestors = (*trunk.ancestors, trunk) if trunk.tokens else trunk.ancestors
        for index, child in enumerate(fork.children):
            path = (*parent.path, (fork.index, index))
            branch = Branch(next(self._branch_ids), parent, path, child.label, child.cursor)
            branch.last_advanced = parent.last_advanced
            branch.allowance = share
            branch.segment = self._new_segment(trunk.end, ancestors, lead=len(lead) if index else 0)
            branch.segment.extend(lead, lead_sampled)
            branch.trail = [branch.segment]
            self.branches[branch.id] = branch
            parent.forked.append(branch)
        firsts = (child.first for child in fork.children)
        events = self._open_stage(*zip(parent.forked, firsts, strict=True))
        parent.fork_stage = parent.forked[0].stage
        for branch, child in zip(tuple(parent.forked), fork.children, strict=True):
            events = self._decode(branch, child.first, events)
        self.resumed_at = self.updated_at
        return events

    def _end_branch(self, branch: Branch) -> list[Event]:
        parent = branch.parent
        if parent is None:
            return self._finish()
        assert parent.fork is not None
        if parent.fork.join != "kv":
            for segment in branch.trail:
                segment.drop(self._pool)
                del self.segments[segment.id]
        del self.branches[branch.id]
        parent.open_children -= 1
        return [] if parent.open_children else self._join(parent)

    def _join(self, parent: Branch) -> list[Event]:
        fork, branches = parent.fork, parent.forked
        assert fork is not None
        parent.critical = max(branch.critical for branch in branches)
        parent.fork, parent.forked = None, []
        self.resumed_at = self.updated_at
        if fork.join == "none":
            return self._end_after_branches(parent, FinishReason.FORKED)
        joined = self._joined_segment(parent.segment, branches, fork.join)
        if fork.join == "kv":
            parent.trail += [segment for branch in branches for segment in branch.trail]
        parent.segment = joined
        parent.trail.append(joined)
        ids = tuple(branch.id for branch in branches)
        events: list[Event] = [Joined(self.request.id, parent.fork_stage, ids)]
        if joined.end >= self._max_context:
            return events + self._end_after_branches(parent, FinishReason.CONTEXT)
        action = parent.cursor.on_join(joined.end)
        if isinstance(action, End):
            return events + self._end_after_branches(parent, action.reason)
        return events + self._proceed(parent, action)

    def _joined_segment(self, before: Segment, branches: list[Branch], join: str) -> Segment:
        """What the parent goes on with: after the longest branch (`kv`), or reading all text again."""
        ancestors = (*before.ancestors, before) if before.tokens else before.ancestors
        trails = [segment for branch in branches for segment in branch.trail if segment.tokens]
        if join == "kv":
            return self._new_segment(max(branch.segment.end for branch in branches), (*ancestors, *trails))
        joined = self._new_segment(before.end, ancestors)
        for segment in trails:
            joined.extend(segment.tokens[segment.lead :], bytes(segment.sampled[segment.lead :]))
        return joined

    def _end_after_branches(self, parent: Branch, reason: FinishReason) -> list[Event]:
        done, stage = parent.completion_tokens, parent.stage
        ended = StageFinished(self.request.id, stage, parent.id, reason, None, done, final=True)
        return [ended, *self._end_branch(parent)]

    def _finish(self) -> list[Event]:
        trunk = self.branches[0]
        first = self.first_token if self.first_token is not None else self.last_token
        started = self.started_at if self.started_at is not None else first
        slo = self.request.slo
        tpot = (self.last_token - first) / (self.tokens - 1) if self.tokens > 1 else 0.0
        usage = Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.tokens,
            critical_path_tokens=trunk.critical,
            preemptions=self.preemptions,
        )
        timing = Timing(
            queue=started - self.arrival,
            ttft=first - self.arrival,
            tpot=tpot,
            total=self.updated_at - self.arrival,
            tpot_slo_met=tpot <= slo.tpot,
            ttft_slo_met=first - self.arrival <= slo.ttft,
        )
        self.release()
        return [Finished(self.request.id, usage, timing)]

    def _fits(self, branch: Branch, action: Action) -> bool:
        """Whether a model-driven fork's worst case fits; if not, the branch decodes on serially.

        Every branch has an allowance of pages that its own forks divide evenly, so that the answer depends
        on the branch's own tokens and never on how far its siblings happen to be.
        """
        if not isinstance(action, Fork) or not isinstance(self.request.program, TagProgram):
            return True
        firsts = [child.first for child in action.children]
        wanted = max(self._pool.pages_for(len(f.prefix) + f.stopping.max_tokens) for f in firsts)
        return self._share(branch, len(firsts)) >= wanted

    def _share(self, branch: Branch, children: int) -> int:
        """Pages for each branch of a fork, after what its parent holds and may need when they have joined."""
        pages_for = self._pool.pages_for
        held = sum(pages_for(len(segment.tokens)) for segment in branch.trail)
        after = pages_for(max(0, branch.limit - branch.segment.end)) + 1
        return (branch.allowance - held - after) // children

    # --- segments --------------------------------------------------------------------------------------

    def _new_segment(self, start: int, ancestors: tuple[Segment, ...], lead: int = 0) -> Segment:
        segment = Segment(next(self._segment_ids), start, ancestors, lead)
        self.segments[segment.id] = segment
        return segment

    def _reuse_prefix(self, root: Segment) -> int:
        """Take the prompt's cached pages, all but what holds its last token. Returns the tokens saved."""
        pool = self._pool
        keys = list(pool.cache.keys(root.tokens[:-1], self.request.cache_salt))
        pages = pool.cache.lookup(keys)
        pool.share(pages)
        root.pages = list(pages)
        root.shared = len(pages)
        root.computed = len(pages) * pool.page_size
        self._published = keys[len(pages) - 1] if pages else None
        return root.computed

    @staticmethod
    def _stop_at(strings: tuple[str, ...], text: str) -> str | None:
        found = [(text.find(string), string) for string in strings if string in text]
        return min(found)[1] if found else None

    def _stop_string(self, stopping: Stopping, generated: list[int]) -> str | None:
        """The stop string that the newest token completed: every token holds at least one byte of it."""
        if not stopping.stop_strings:
            return None
        tail = max(len(string.encode()) for string in stopping.stop_strings)
        return self._stop_at(stopping.stop_strings, self._codec.decode(generated[-tail:]))
