"""What a request does next: the client's plan of stages, or the model's own tags.

A program is data; a `Cursor` is where one branch stands in it. Asked at the end of a stage, or after each
token, it answers with the next `Action`: decode, fork, or end. Answers depend on the branch's own tokens and
positions alone, never on what siblings or the schedule did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from scheduler.request import FinishReason, Stopping
from scheduler.sampling import SamplingParams


class Codec(Protocol):
    """The tokenizer, as far as programs need it. `decode` keeps special tokens."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialStage:
    """One sequence: `prefix` is forced into the context, then tokens are sampled until `stopping`."""

    stopping: Stopping
    prefix: tuple[int, ...] = ()
    sampling: SamplingParams | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchSpec:
    """One branch of a parallel stage: a serial stage of its own, then `stages` (which may fork again)."""

    stopping: Stopping
    label: str = ""
    prefix: tuple[int, ...] = ()
    sampling: SamplingParams | None = None
    stages: tuple[Stage, ...] = ()


JOINS = ("kv", "reprefill", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelStage:
    """Branches that share everything before the stage.

    `join` is how the next stage sees them: `kv` concatenates their KV pages in branch order, without a copy
    or a recomputed token (for models trained for it); `reprefill` reads their tokens again as ordinary
    text; `none` ends the branch that forked.
    """

    branches: tuple[BranchSpec, ...]
    join: str = "reprefill"


Stage = SerialStage | ParallelStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A client-driven program: the trunk's stages, in order."""

    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TagGrammar:
    """The tags with which a model opens and closes branches of its own (Multiverse, NPR and their like).

    When `plan_close` is generated, each match of `outline` (a regular expression whose first group is the
    branch's label) after the last `plan_open` becomes a branch that begins with `branch_open`, where
    `{label}` is replaced, and ends with `branch_close`. When all have ended, the parent goes on after
    `join_open`.
    """

    name: str
    plan_open: str
    outline: str
    plan_close: str
    branch_open: str
    branch_close: str
    join_open: str
    join: str = "kv"


MULTIVERSE = TagGrammar(
    name="multiverse",
    plan_open="<Goal>",
    outline=r"<Outline>\s*(\d+(?:\.\d+)*)\s*:",
    plan_close="</Goal>",
    branch_open="\n<Path>\n{label}:",
    branch_close="</Path>",
    join_open="\n<Conclusion>\n",
)

# Native Parallel Reasoner (arXiv 2512.07461): Multiverse's mechanics in its own words, one level deep.
NPR = TagGrammar(
    name="npr",
    plan_open="<guideline>",
    outline=r"<plan>\s*(\d+)\s*:",
    plan_close="</guideline>",
    branch_open="\n<step>\n{label}:",
    branch_close="</step>",
    join_open="\n<takeaway>\n",
)

# ThreadWeaver (github.com/facebookresearch/threadweaver): an ordinary model, which reads its threads again.
THREADWEAVER = TagGrammar(
    name="threadweaver",
    plan_open="<Outlines>",
    outline=r"<Outline>\s*(\d+)\s*:",
    plan_close="</Outlines>",
    branch_open="\n<Thread>\n{label}:",
    branch_close="</Thread>",
    join_open="</Parallel>",
    join="reprefill",
)

GRAMMARS = {grammar.name: grammar for grammar in (MULTIVERSE, NPR, THREADWEAVER)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TagProgram:
    """A model-driven program. Limits are per branch and on the critical path, never over siblings."""

    grammar: TagGrammar
    stopping: Stopping
    branch_max_tokens: int
    max_branches: int = 16
    max_depth: int = 4


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
    """Open branches. `index` is the stage's place in its branch's own program: part of the sampling key."""

    index: int
    children: tuple[Child, ...]
    join: str


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
        return Fork(index, children, stage.join)


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

    def begin(self, position: int) -> Action:
        self._limit = position + self._program.stopping.max_tokens
        return self._decode((), position)

    def on_token(self, tokens: Sequence[int], stage_from: int, position: int) -> Action | None:
        grammar = self._program.grammar
        if self._depth > 0 and self._closes(grammar.branch_close, tokens, stage_from):
            return End(FinishReason.BRANCH_CLOSED)
        if self._depth < self._program.max_depth and self._closes(grammar.plan_close, tokens, stage_from):
            return self._fork(self._codec.decode(list(tokens[stage_from:])), position)
        return None

    def on_stop(self, reason: FinishReason) -> Action:
        return End(reason)

    def on_join(self, position: int) -> Action:
        return self._decode(tuple(self._codec.encode(self._program.grammar.join_open)), position)

    def _decode(self, prefix: tuple[int, ...], position: int) -> Decode | End:
        assert self._limit is not None
        left = self._limit - position - len(prefix)
        if left <= 0:
            return End(FinishReason.MAX_TOKENS)
        return Decode(prefix, replace(self._program.stopping, max_tokens=left))

    def _closes(self, tag: str, tokens: Sequence[int], stage_from: int) -> bool:
        """Whether the newest token completes `tag`: every token holds at least one byte of it."""
        tail = list(tokens[max(stage_from, len(tokens) - len(tag.encode())) :])
        text = self._codec.decode(tail)
        return tag in text and text.count(tag) > self._codec.decode(tail[:-1]).count(tag)

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
        return Fork(self._forks - 1, tuple(children), grammar.join)


def cursor(program: Plan | TagProgram, codec: Codec) -> Cursor:
    """The cursor at the beginning of a request's program."""
    return PlanCursor(program.stages) if isinstance(program, Plan) else TagCursor(program, codec)


def longest_first_prefix(program: Plan | TagProgram) -> int:
    """Tokens that the program may force into the context before the first one is sampled."""
    if isinstance(program, TagProgram):
        return 0
    first = program.stages[0]
    parts = (first,) if isinstance(first, SerialStage) else first.branches
    return max(len(part.prefix) for part in parts)


def check_program(program: Plan | TagProgram) -> None:
    """Raise ValueError, naming the stage, for a program that could not run."""
    if isinstance(program, Plan):
        if not program.stages:
            raise ValueError("plan: at least one stage is needed")
        _check_stages(program.stages, "plan")
        return
    if min(program.stopping.max_tokens, program.branch_max_tokens) < 1:
        raise ValueError("max_tokens and branch_max_tokens must be at least 1")
    if program.grammar.join not in ("kv", "reprefill"):
        raise ValueError(f"a grammar's join must be kv or reprefill, got {program.grammar.join!r}")
    if program.grammar.join == "kv" and not program.grammar.join_open:
        raise ValueError("a grammar that joins by kv needs a join_open to feed")


def _check_stages(stages: tuple[Stage, ...], where: str) -> None:
    before = ""  # how the stage before joins
    for index, stage in enumerate(stages):
        name = f"{where}.stages[{index}]"
        parts = (stage,) if isinstance(stage, SerialStage) else stage.branches
        if not parts:
            raise ValueError(f"{name}: a parallel stage needs at least one branch")
        if any(part.stopping.max_tokens < 1 for part in parts):
            raise ValueError(f"{name}: max_tokens must be at least 1")
        if before == "none":
            raise ValueError(f"{name}: nothing can follow a stage whose branches are not joined")
        if before == "kv" and not all(part.prefix for part in parts):
            raise ValueError(f"{name}: a stage after a kv join needs a prefix to feed")
        before = ""
        if isinstance(stage, ParallelStage):
            if stage.join not in JOINS:
                raise ValueError(f"{name}: join must be one of {', '.join(JOINS)}, got {stage.join!r}")
            before = stage.join
            for child, spec in enumerate(stage.branches):
                _check_stages(spec.stages, f"{name}.branches[{child}]")
