"""What a request does next: the client's plan of stages, or the model's own tags.

A program is data; `Cursor` is where one branch stands in it. Given what a branch has generated, a cursor
answers with the next `Action`: decode on, fork, or end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.request import SamplingParams, Stopping


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
    """The tags with which a model opens and closes branches of its own (PAPER: Multiverse, NPR, ...).

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TagProgram:
    """A model-driven program. Limits are per branch and on the critical path, never over siblings."""

    grammar: TagGrammar
    stopping: Stopping
    branch_max_tokens: int
    max_branches: int = 16
    max_depth: int = 4
