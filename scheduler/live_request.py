"""The live state of one request: its tree of branches and segments, and what each token does to it.

A request is a trunk (branch 0) that may fork into branches, which may fork again. A branch decodes into its
own segment and reads the segments of its ancestors. Everything here follows from tokens that came back; what
runs in which step is decided in `scheduler.scheduler`.
"""

from __future__ import annotations

import itertools
from functools import partial
from operator import attrgetter

from scheduler.allowance import fits, share
from scheduler.branch import Branch
from scheduler.cursor import Action, Codec, Decode, End, Fork, cursor
from scheduler.events import (
    Event,
    Finished,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    TokenEmitted,
    Usage,
    WidthChanged,
)
from scheduler.footprint import worst_case_pages
from scheduler.pace import Pace
from scheduler.pages import PagePool
from scheduler.prefix import CachedPrefix
from scheduler.program import TagProgram, longest_chain
from scheduler.race import outrun, settle
from scheduler.request import Request
from scheduler.search import Match, Search
from scheduler.segment import Segment, newest_first, text
from scheduler.step import Entry, Sample, SlotSetup
from scheduler.stopping import FinishReason

# From all of its fields, in half the time that a named tuple's own constructor takes.
_token_emitted = partial[TokenEmitted](tuple.__new__, TokenEmitted)  # type: ignore[reportUnknownMemberType]


class LiveRequest:
    """A request from its arrival to its last token.

    pace         when its tokens came, and when they are due
    age          order of first start: the oldest running request is never preempted
    resident     it runs, and may hold pages and slots
    prompt_read  a launched step samples from it: it has a deadline from then on
    """

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
        self.age = 0
        self.pace = Pace(request.slo, now)
        self.preemptions = 0
        self.cached_tokens = 0
        self.prompt_read = False
        self.resident = False
        self.finished = False
        self.branches: dict[int, Branch] = {}
        self.segments: dict[int, Segment] = {}
        self.worst_case_pages = worst_case_pages(request, pool.page_size, max_context)
        self.longest_chain = longest_chain(request.program)
        self._pool = pool
        self._codec = codec
        self._free_slots = free_slots
        self._max_context = max_context
        self._segment_ids = itertools.count()
        self._branch_ids = itertools.count()
        self._stages = itertools.count()
        self._prefix: CachedPrefix | None = None  # since it first left the queue
        self._width = (1, 1)  # as last reported: how many branches advanced, and how many were ready
        self._unsent: list[Event] = []

    # --- what the scheduler asks -----------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Branches that decode or could: all but those that wait for branches of their own."""
        return [branch.open_children for branch in self.branches.values()].count(0)

    def runnable(self) -> list[Branch]:
        """Branches that could advance: the least recently advanced first, then in the order of their ids."""
        ready = [branch for branch in self.branches.values() if branch.backlog]
        if len(ready) > 1:
            ready.sort(key=attrgetter("last_advanced"))
        return ready

    @property
    def holds_pages(self) -> bool:
        return any(segment.pages for segment in self.segments.values())

    def reserved_pages(self, share: float) -> int:
        """Pages that it should find: for the tokens it knows already, and for a share of its worst case."""
        held = wanted = 0
        for segment in self.segments.values():
            held += len(segment.pages)
            wanted += max(len(segment.pages), self._pool.pages_for(len(segment.tokens)))
        return max(wanted - held, int(share * (self.worst_case_pages - held)))

    def check(self) -> None:
        """Raise AssertionError unless its segments hold what they need for what is computed, and no more."""
        assert self.resident or not self.holds_pages, "a request that does not run holds pages"
        for segment in self.segments.values():
            held, most = len(segment.pages), max(segment.computed, len(segment.tokens))
            assert self._pool.pages_for(segment.computed) <= held <= self._pool.pages_for(most)
            assert segment.shared * self._pool.page_size <= len(segment.tokens)
        trees = [self.branches[0].tree()] if self.branches else []
        known = {segment for tree in trees for branch in tree for segment in branch.trail}
        assert known.issuperset(self.segments.values()), "a segment is left of a branch that is gone"
        assert all(outrun(branch) is None for branch in self.branches.values()), "a loser goes on"

    # --- coming and going ------------------------------------------------------------------------------

    def resume(self, now: float) -> None:
        """Leave the queue: for the first time, or again after a preemption."""
        self.pace.start(now)
        self.resident = True
        if self._prefix is not None:
            self._reuse_prefix(self._prefix)
            return
        root = self._new_segment(0, ())
        root.extend(self.request.prompt)
        self._prefix = CachedPrefix(root, self.request.cache_salt, self._pool)
        program = cursor(self.request.program, self._codec)
        trunk = Branch(next(self._branch_ids), None, (), "", program, root)
        trunk.allowance = self._pool.num_pages
        self.branches[trunk.id] = trunk
        self._unsent += self._proceed(trunk, trunk.cursor.begin(root.end))
        self._reuse_prefix(self._prefix)
        self.cached_tokens = min(root.computed, len(self.request.prompt))

    def preempt(self) -> None:
        """Give up all pages; every token is kept and replayed later."""
        self.preemptions += 1
        self.resident = False
        for segment in self.segments.values():
            segment.drop(self._pool)
        for branch in self.branches.values():
            branch.complete = 0
            self.free_slot(branch)

    def drop_tail(self, branch: Branch) -> None:
        """Give up the pages of one branch's own segment, as long as it has siblings."""
        branch.segment.drop(self._pool)
        self.free_slot(branch)

    def release(self) -> None:
        """Give back all pages and slots; what is still in flight will find nobody."""
        for segment in self.segments.values():
            segment.drop(self._pool)
        for branch in self.branches.values():
            self.free_slot(branch)
            branch.forked = []  # which know it as their parent: garbage that refers to itself stays for long
        self.segments.clear()
        self.branches.clear()
        self.resident, self.finished = False, True

    def free_slot(self, branch: Branch) -> None:
        if branch.slot is not None:
            self._free_slots.append(branch.slot)
            branch.slot = None

    def slot_setup(self, branch: Branch, slot: int) -> SlotSetup:
        """Give `branch` a slot for the token that it samples next."""
        branch.slot = slot
        self.prompt_read = True
        if not branch.sampling.uses_penalties:
            return SlotSetup(slot, branch.sampling)
        return SlotSetup(slot, branch.sampling, *branch.history())

    # --- tokens ----------------------------------------------------------------------------------------

    def accept(self, entry: Entry, sample: Sample, now: float) -> list[Event]:
        """A sampled token came back. A sample that the branch no longer waits for is dropped."""
        branch = self.branches.get(entry.branch)
        if branch is None or not branch.in_flight or branch.in_flight[0] is not entry:
            return []
        del branch.in_flight[0]
        events = self._first_events() if self.pace.sample(now) else []
        stopping, token = branch.stopping, sample.token
        if token in stopping.eos_ids or token in stopping.stop_ids:
            reason = FinishReason.EOS if token in stopping.eos_ids else FinishReason.STOP
            return events + self._end_stage(branch, branch.cursor.on_stop(reason), reason, token)
        branch.segment.append(token)
        self.pace.token(now)
        branch.completion_tokens += 1
        branch.critical += 1
        events.append(_token_emitted((self.request.id, branch.id, sample, branch.completion_tokens)))
        loser = outrun(branch)
        if loser is not None and loser.parent is not None:
            events += self._go_on_without(loser.parent, [loser])
        else:
            events += self._look_for_end(branch)
        return events

    def _look_for_end(self, branch: Branch) -> list[Event]:
        """What the newest token brings about: a tag of the model, a stop string, or the limit."""
        segment = branch.segment
        position = segment.start + len(segment.tokens)
        action = branch.cursor.on_token(segment.tokens, branch.stage_from, position)
        if action is not None and self._fits(branch, action):
            reason = action.reason if isinstance(action, End) else FinishReason.FORKED
            return self._end_stage(branch, action, reason)
        found = branch.search.push(segment.tokens[-1]) if branch.search else []
        if found:
            reason = FinishReason.STOP
        elif position >= branch.limit:
            reason = FinishReason.CONTEXT if position >= self._max_context else FinishReason.MAX_TOKENS
        else:
            return []
        return self._end_stage(branch, branch.cursor.on_stop(reason), reason, found[0] if found else None)

    def _search(self, branch: Branch) -> Search | None:
        """For the stop strings of the stage that begins now."""
        stopping = branch.stopping
        if not stopping.stop_strings:
            return None
        before = newest_first(branch.segment.chain)
        return Search(
            stopping.stop_strings, self._codec.reader(before, special_tokens=stopping.special_tokens)
        )

    def width_changed(self, width: int, wanted: int) -> list[Event]:
        """Tell how many branches advanced, and how many were ready, unless it is known or too early."""
        if self.pace.first_token is None or (width, wanted) == self._width:
            return []
        self._width = (width, wanted)
        return [WidthChanged(self.request.id, width, wanted)]

    # --- stages ----------------------------------------------------------------------------------------

    def _first_events(self) -> list[Event]:
        events, self._unsent = self._unsent, []
        return [Started(self.request.id, len(self.request.prompt), self.cached_tokens), *events]

    def _end_stage(
        self, branch: Branch, action: Action, reason: FinishReason, stop: int | Match | None = None
    ) -> list[Event]:
        branch.in_flight.clear()
        branch.segment.cut(len(branch.segment.tokens), self._pool)
        self.free_slot(branch)
        if isinstance(action, End):
            branch.ended = reason, stop
        ended = self._stage_finished(branch, reason, stop, isinstance(action, End) and not branch.races)
        return [ended, *self._proceed(branch, action)]

    def _stage_finished(
        self, branch: Branch, reason: FinishReason, stop: int | Match | None, final: bool
    ) -> StageFinished:
        done = branch.completion_tokens
        return StageFinished(self.request.id, branch.stage, branch.id, reason, stop, done, final)

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
        if segment.missing == 0:
            # The stage before ended on a token that was dropped or fed already, and this one brings nothing
            # to go on from: the last token is fed once more, over itself.
            segment.computed -= 1
        branch.stopping = action.stopping
        branch.sampling = action.sampling or self.request.sampling
        branch.search = self._search(branch)
        branch.stage_from = len(segment.tokens)
        branch.limit = min(segment.end + action.stopping.max_tokens, self._max_context)
        if segment.end >= branch.limit:
            reason = FinishReason.CONTEXT
            return events + self._end_stage(branch, End(reason), reason)
        return events

    def _fork(self, parent: Branch, fork: Fork) -> list[Event]:
        """Branches start right after the parent's segment, on pages of their own, at a common position."""
        allowance = share(parent, len(fork.children), self._pool.pages_for)
        lead = None if all(child.first.prefix for child in fork.children) else self._lend(parent)
        trunk = parent.segment
        ancestors = trunk.chain if trunk.tokens else trunk.ancestors
        parent.fork, parent.open_children = fork, len(fork.children)
        for index, child in enumerate(fork.children):
            segment = self._new_segment(trunk.end, ancestors, lead)
            segment.extend(*parent.lent)
            path = (*parent.path, (fork.index, index))
            branch = Branch(next(self._branch_ids), parent, path, child.label, child.cursor, segment)
            branch.last_advanced = parent.last_advanced
            branch.allowance = allowance
            self.branches[branch.id] = branch
            parent.forked.append(branch)
        born = tuple(zip(parent.forked, (child.first for child in fork.children), strict=True))
        events = self._open_stage(*born)
        parent.stage = parent.forked[0].stage
        for branch, first in born:
            if branch.id in self.branches:  # it has not lost a race to one that ended at once
                events = self._decode(branch, first, events)
        self.pace.branch()
        return events

    def _lend(self, parent: Branch) -> int:
        """Seal the parent one token short: each of its branches feeds that token as its own first row.

        So it is where a branch has nothing to begin with. Returns the `lead` by which the token is known.
        """
        trunk = parent.segment
        parent.lent = trunk.tokens[-1:], trunk.sampled[-1:]
        trunk.cut(len(trunk.tokens) - 1, self._pool)
        if trunk.lead is not None and not trunk.tokens:  # it was lent to the parent in the same way
            return trunk.lead
        return trunk.id

    def _end_branch(self, branch: Branch) -> list[Event]:
        parent = branch.parent
        if parent is None:
            return self._finish()
        assert parent.fork is not None
        if parent.fork.join != "kv":
            self._drop(branch)
        del self.branches[branch.id]
        parent.open_children -= 1
        return self._go_on_without(parent, settle(parent))

    def _go_on_without(self, parent: Branch, losers: list[Branch]) -> list[Event]:
        """Stop the branches that are out of a race; join the others if all of them have ended."""
        turns = [branch.last_advanced for loser in losers for branch in loser.tree()]
        parent.last_advanced = max([parent.last_advanced, *turns])  # their turns were turns of the fork
        events = [event for loser in losers for event in self._stop(loser)]
        parent.forked = [branch for branch in parent.forked if branch not in losers]
        return events if parent.open_children else events + self._join(parent)

    def _stop(self, branch: Branch) -> list[Event]:
        """End a branch and all those below it: their pages and slots are free, and nobody waits for them."""
        events = [event for child in branch.forked for event in self._stop(child)]
        branch.forked = []
        self._drop(branch)
        if branch.ended is None:
            assert branch.parent is not None
            branch.parent.open_children -= 1
            branch.in_flight.clear()
            self.free_slot(branch)
            del self.branches[branch.id]
        elif not branch.races:
            return events  # its end is known
        return [*events, self._stage_finished(branch, FinishReason.OUTRUN, None, final=True)]

    def _drop(self, branch: Branch) -> None:
        """Forget the segments of a branch: nobody will read them any more."""
        for segment in branch.trail:
            segment.drop(self._pool)
            self.segments.pop(segment.id, None)

    def _join(self, parent: Branch) -> list[Event]:
        fork, branches = parent.fork, parent.forked
        assert fork is not None
        events: list[Event] = []
        if fork.is_race:
            ends = [(branch, *branch.ended) for branch in branches if branch.ended is not None]
            events += [self._stage_finished(*end, final=True) for end in ends]
        parent.critical = max(branch.critical for branch in branches)
        parent.last_advanced = max([parent.last_advanced, *(branch.last_advanced for branch in branches)])
        parent.fork, parent.forked, parent.bar = None, [], None
        self.pace.branch()
        lent, parent.lent = parent.lent, ((), ())
        if fork.join == "none":
            parent.segment.extend(*lent)  # a join further up will read it
            return events + self._end_after_branches(parent, FinishReason.FORKED)
        joined = self._joined_segment(parent.segment, branches, fork.join)
        if fork.join == "kv":
            parent.trail += [segment for branch in branches for segment in branch.trail]
        parent.segment, parent.complete = joined, 0
        parent.trail.append(joined)
        ids = tuple(branch.id for branch in branches)
        events.append(Joined(self.request.id, parent.stage, ids))
        if joined.end >= self._max_context:
            return events + self._end_after_branches(parent, FinishReason.CONTEXT)
        action = parent.cursor.on_join(joined.end)
        if isinstance(action, End):
            return events + self._end_after_branches(parent, action.reason)
        return events + self._proceed(parent, action)

    def _joined_segment(self, before: Segment, branches: list[Branch], join: str) -> Segment:
        """What the parent goes on with: after the longest branch (`kv`), or reading all text again."""
        ancestors = before.chain if before.tokens else before.ancestors
        trails = [segment for branch in branches for segment in branch.trail if segment.tokens]
        if join == "kv":
            return self._new_segment(max(branch.segment.end for branch in branches), (*ancestors, *trails))
        joined = self._new_segment(before.end, ancestors, trails[0].lead)
        joined.extend(*text(trails))
        return joined

    def _end_after_branches(self, parent: Branch, reason: FinishReason) -> list[Event]:
        parent.ended = reason, None
        ended = self._stage_finished(parent, reason, None, final=not parent.races)
        return [ended, *self._end_branch(parent)]

    def _finish(self) -> list[Event]:
        trunk = self.branches[0]
        usage = Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.pace.tokens,
            critical_path_tokens=trunk.critical,
            preemptions=self.preemptions,
        )
        self.release()
        return [Finished(self.request.id, usage, self.pace.timing())]

    def _fits(self, branch: Branch, action: Action) -> bool:
        """Whether a fork may be opened; if not, the branch decodes on serially."""
        if not isinstance(action, Fork) or not isinstance(self.request.program, TagProgram):
            return True
        return fits(branch, action, self._pool.pages_for)

    # --- the prefix cache ------------------------------------------------------------------------------

    def publish_prefix(self) -> None:
        """Offer what the trunk has computed before its first fork to the prefix cache."""
        if self._prefix is not None:
            self._prefix.publish()

    def _reuse_prefix(self, prefix: CachedPrefix) -> None:
        """Begin with what the cache has of the trunk."""
        trunk = self.branches[0]
        prefix.reuse(sealed=trunk.segment is not prefix.segment or trunk.open_children > 0)

    # --- segments --------------------------------------------------------------------------------------

    def _new_segment(self, start: int, ancestors: tuple[Segment, ...], lead: int | None = None) -> Segment:
        segment = Segment(next(self._segment_ids), start, ancestors, lead)
        self.segments[segment.id] = segment
        return segment
