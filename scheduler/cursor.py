"""What a request does next: walks through its program.

A program is data; a `Cursor` is where one branch stands in it. Asked at the end of a stage, or after each
token, it answers with the next `Action`: decode, fork, or end. Answers depend on the branch's own tokens and
positions alone, never on what siblings or the schedule did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from scheduler.program import Plan, SerialStage, Stage, TagProgram
from scheduler.sampling import SamplingParams
from scheduler.search import Reader, Search
from scheduler.stopping import FinishReason, Stopping


class Codec(Protocol):
    """The tokenizer, as far as programs need it. `decode` keeps special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of text that goes on from other text."""
        ...

    def decode(self, ids: list[int]) -> str: ...

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
        self._search: Search | None = None  # for the tags, in the text of the stage
        self._read = 0  # tokens of the segment that it has read

    def begin(self, position: int) -> Action:
        self._limit = position + self._program.stopping.max_tokens
        return self._decode((), position)

    def on_token(self, tokens: Sequence[int], stage_from: int, position: int) -> Action | None:
        grammar = self._program.grammar
        closed = self._closed(tokens, stage_from)
        if self._depth > 0 and grammar.branch_close in closed:
            return End(FinishReason.BRANCH_CLOSED)
        if self._depth < self._program.max_depth and grammar.plan_close in closed:
            return self._fork(self._codec.decode(list(tokens[stage_from:])), position)
        return None

    def on_stop(self, reason: FinishReason) -> Action:
        return End(reason)

    def on_join(self, position: int) -> Action:
        return self._decode(tuple(self._codec.encode(self._program.grammar.join_open)), position)

    def _decode(self, prefix: tuple[int, ...], position: int) -> Decode | End:
        assert self._limit is not None
        self._search = None
        left = self._limit - position - len(prefix)
        if left <= 0:
            return End(FinishReason.MAX_TOKENS)
        return Decode(prefix, replace(self._program.stopping, max_tokens=left))

    def _closed(self, tokens: Sequence[int], stage_from: int) -> set[str]:
        """The tags that the newest token completes."""
        if self._search is None:
            grammar, before = self._program.grammar, reversed(tokens[:stage_from])
            reader = self._codec.reader(before, special_tokens=True)
            self._search, self._read = Search((grammar.branch_close, grammar.plan_close), reader), stage_from
        found = [self._search.push(token) for token in tokens[self._read :]]
        self._read = len(tokens)
        return {match.string for matches in found for match in matches}

    def _fork(self, text: str, position: int) -> Fork | None:
        program, grammar = self._program, self._program.grammar
        _, opened, goal = text.rpartition(grammar.plan_open)
        labels = [match.group(1) for match in re.finditer(grammar.outline, goal)] if opened else []
        if not 0 < len(labels) <= program.max_branches:
            return None
        assert self._limit is not None
        limit = min(self._limit, position + program.branch_max_tokens)
        children: list[Child] = []
        for label in labels:
            seed = tuple(self._codec.encode(grammar.branch_open.replace("{label}", label)))
            cursor = TagCursor(program, self._codec, self._depth + 1, limit)
            first = cursor._decode(seed, position)
            if isinstance(first, End):  # no room for even one token of it
                return None
            children.append(Child(label, first, cursor))
        self._forks += 1
        return Fork(self._forks - 1, tuple(children), grammar.join, len(children))


def cursor(program: Plan | TagProgram, codec: Codec) -> Cursor:
    """The cursor at the beginning of a request's program."""
    return PlanCursor(program.stages) if isinstance(program, Plan) else TagCursor(program, codec)
