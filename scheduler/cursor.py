"""The cursor: walks through a request's program, and says what comes next.

A program is data; a `Cursor` is where one branch stands in it. Asked at the end of a stage, or after each
token, it answers with the next `Action`: decode, fork, or end. Answers depend on the branch's own tokens and
positions alone, never on what siblings or the schedule did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from scheduler.announcement import Announcement
from scheduler.program import Plan, SerialStage, Stage, TagProgram
from scheduler.sampling import SamplingParams
from scheduler.search import Reader, Search
from scheduler.stopping import FinishReason, Stopping


class Codec(Protocol):
    """The tokenizer, as far as programs need it."""

    def encode(self, text: str) -> list[int]:
        """The ids of text that goes on from other text."""
        ...

    def reader(self, before: Iterable[int], *, special_tokens: bool) -> Reader:
        """Reads the tokens that follow `before` (the newest first), with special tokens or without."""
        ...


@dataclass(frozen=True, slots=True)
class Decode:
    """Force `prefix`, then sample until `stopping` ends the stage."""

    prefix: tuple[int, ...]
    stopping: Stopping
    sampling: SamplingParams | None = None


@dataclass(frozen=True, slots=True)
class Child:
    """A branch about to be born: its label, its first action, and the cursor that follows."""

    label: str
    first: Decode
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class Fork:
    """Open branches.

    index    the stage's place in its branch's own program: part of the sampling key
    first_k  how many of the branches are joined: those with the fewest tokens
    """

    index: int
    children: tuple[Child, ...]
    join: str
    first_k: int

    @property
    def is_race(self) -> bool:
        """Whether some of the branches are not joined."""
        return self.first_k < len(self.children)


@dataclass(frozen=True, slots=True)
class End:
    reason: FinishReason


Action = Decode | Fork | End


class Cursor(Protocol):
    """Where a branch stands in its program. Positions are rotary positions of the next token."""

    def begin(self, position: int) -> Action:
        """The first action, after the prompt."""
        ...

    def on_token(self, tokens: Sequence[int], stage_from: int, position: int) -> Action | None:
        """The segment's tokens, one of them new, the stage's from `stage_from` on; None to decode on."""
        ...

    def on_stop(self, reason: FinishReason) -> Action:
        """The stage's `stopping` ended it."""
        ...

    def on_join(self, position: int) -> Action:
        """The branches that this one forked have been joined."""
        ...


class PlanCursor:
    """Walks the stages of a plan, or of a branch of one."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self._stages = stages
        self._next = 0

    def begin(self, position: int) -> Action:
        return self._advance(FinishReason.FORKED)

    def on_token(self, tokens: Sequence[int], stage_from: int, position: int) -> Action | None:
        return None

    def on_stop(self, reason: FinishReason) -> Action:
        return self._advance(reason)

    def on_join(self, position: int) -> Action:
        return self._advance(FinishReason.FORKED)

    def _advance(self, reason: FinishReason) -> Action:
        if self._next == len(self._stages):
            return End(reason)
        index, stage = self._next, self._stages[self._next]
        self._next += 1
        if isinstance(stage, SerialStage):
            return Decode(stage.prefix, stage.stopping, stage.sampling)
        children = tuple(
            Child(spec.label, Decode(spec.prefix, spec.stopping, spec.sampling), PlanCursor(spec.stages))
            for spec in stage.branches
        )
        return Fork(index, children, stage.join, stage.first_k or len(children))


class TagCursor:
    """Watches one branch's text for the grammar's tags.

    A fork that cannot be opened (never begun, no outline, too many, too deep, no room) is no fork: the branch
    decodes on serially. `limit` is the first position that the branch may not fill.
    """

    def __init__(self, program: TagProgram, codec: Codec, depth: int = 0, limit: int | None = None) -> None:
        self._program = program
        self._codec = codec
        self._depth = depth
        self._limit = limit
        self._forks = 0
        self._text: _StageText | None = None  # of the stage that goes on
        self._read = 0  # tokens of the segment that it has read
        self._seeds: dict[str, tuple[int, ...]] = {}  # what the branches that were tried last begin with

    def begin(self, position: int) -> Action:
        self._limit = position + self._program.stopping.max_tokens
        return self._decode((), position)

    def on_token(self, tokens: Sequence[int], stage_from: int, position: int) -> Action | None:
        grammar = self._program.grammar
        text = self._text
        if text is None:
            reader = self._codec.reader(reversed(tokens[:stage_from]), special_tokens=True)
            text = self._text = _StageText(self._program, reader)
            self._read = stage_from
        closed = {tag for token in tokens[self._read :] for tag in text.push(token)}
        self._read = len(tokens)
        if self._depth > 0 and grammar.branch_close in closed:
            return End(FinishReason.BRANCH_CLOSED)
        if self._depth < self._program.max_depth and grammar.plan_close in closed:
            return self._fork(text.announced.labels(), position)
        return None

    def on_stop(self, reason: FinishReason) -> Action:
        return End(reason)

    def on_join(self, position: int) -> Action:
        return self._decode(tuple(self._codec.encode(self._program.grammar.join_open)), position)

    def _decode(self, prefix: tuple[int, ...], position: int) -> Decode | End:
        assert self._limit is not None
        self._text = None
        left = self._limit - position - len(prefix)
        if left <= 0:
            return End(FinishReason.MAX_TOKENS)
        return Decode(prefix, replace(self._program.stopping, max_tokens=left))

    def _fork(self, labels: Sequence[str], position: int) -> Fork | None:
        if not labels:
            return None
        program = self._program
        assert self._limit is not None
        limit = min(self._limit, position + program.branch_max_tokens)
        seeds, self._seeds = self._seeds, {}  # a fork without room is tried each time that its plan closes
        children: list[Child] = []
        for label in labels:
            self._seeds[label] = seed = seeds.get(label) or self._seed(label)
            cursor = TagCursor(program, self._codec, self._depth + 1, limit)
            first = cursor._decode(seed, position)
            if isinstance(first, End):  # no room for even one token of it
                return None
            children.append(Child(label, first, cursor))
        self._forks += 1
        return Fork(self._forks - 1, tuple(children), program.grammar.join, len(children))

    def _seed(self, label: str) -> tuple[int, ...]:
        return tuple(self._codec.encode(self._program.grammar.branch_open.replace("{label}", label)))


class _StageText:
    """The text of one stage: the tags that a token completes, and what has been announced so far."""

    def __init__(self, program: TagProgram, reader: Reader) -> None:
        grammar = program.grammar
        self._reader = reader
        self._search = Search((grammar.branch_close, grammar.plan_close), reader)
        self.announced = Announcement(grammar, program.max_branches)

    def push(self, token: int) -> list[str]:
        """The tags that this token completes."""
        settled, fresh = self._reader.push(token), self._reader.fresh
        self.announced.read(settled, fresh)
        return [match.string for match in self._search.look(settled, fresh)]


def cursor(program: Plan | TagProgram, codec: Codec) -> Cursor:
    """The cursor at the beginning of a request's program."""
    return PlanCursor(program.stages) if isinstance(program, Plan) else TagCursor(program, codec)
