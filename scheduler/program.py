"""A request's program as data: the client's plan of stages, or the model's own tags; and their checks.

`scheduler.cursor` walks through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.grammars import TagGrammar
from scheduler.sampling import SamplingParams
from scheduler.stopping import Stopping


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialStage:
    """One sequence: `prefix` is forced into the context, then tokens are sampled until `stopping`."""

    stopping: Stopping
    prefix: tuple[int, ...] = ()
    sampling: SamplingParams | None = None

    @property
    def parts(self) -> tuple[SerialStage, ...]:
        """The sequences of the stage: itself."""
        return (self,)


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

    `first_k` says how many of the branches are joined: those with the fewest sampled tokens on their longest
    chain, the earlier of two that have as many; 0: all of them. The others are stopped as soon as they cannot
    be among them.
    """

    branches: tuple[BranchSpec, ...]
    join: str = "reprefill"
    first_k: int = 0

    @property
    def parts(self) -> tuple[BranchSpec, ...]:
        """The sequences of the stage: its branches."""
        return self.branches


Stage = SerialStage | ParallelStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A client-driven program: the trunk's stages, in order."""

    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TagProgram:
    """A model-driven program. Limits are per branch and on the critical path, never over siblings."""

    grammar: TagGrammar
    stopping: Stopping
    branch_max_tokens: int
    max_branches: int = 16
    max_depth: int = 4


def longest_first_prefix(program: Plan | TagProgram) -> int:
    """Tokens that the program may force into the context before the first one is sampled."""
    if isinstance(program, TagProgram):
        return 0
    return max(len(part.prefix) for part in program.stages[0].parts)


def longest_chain(program: Plan | TagProgram) -> int:
    """The most tokens that are sampled one after the other."""
    if isinstance(program, TagProgram):
        return program.stopping.max_tokens
    return _longest_chain(program.stages)


def _longest_chain(stages: tuple[Stage, ...]) -> int:
    return sum(
        max(
            part.stopping.max_tokens + (_longest_chain(part.stages) if isinstance(part, BranchSpec) else 0)
            for part in stage.parts
        )
        for stage in stages
    )


def check_program(
    program: Plan | TagProgram, encode: Callable[[str], Sequence[int]] = lambda text: text.encode()
) -> None:
    """Raise ValueError, naming the stage, for a program that could not run.

    `encode` gives the tokens of forced text, as the tokenizer has them: a text can have none.
    """
    if isinstance(program, Plan):
        if not program.stages:
            raise ValueError("plan: at least one stage is needed")
        _check_stages(program.stages, "plan")
        return
    if min(program.stopping.max_tokens, program.branch_max_tokens) < 1:
        raise ValueError("max_tokens and branch_max_tokens must be at least 1")
    if program.grammar.join not in ("kv", "reprefill"):
        raise ValueError(f"a grammar's join must be kv or reprefill, got {program.grammar.join!r}")
    if program.grammar.join == "kv" and not encode(program.grammar.join_open):
        raise ValueError("a grammar that joins by kv needs a join_open that has tokens to feed")


def fault_of_following(before: Stage | None) -> str | None:
    """Why no stage can follow the stage `before`; None if one can."""
    if isinstance(before, ParallelStage) and before.join == "none":
        return "nothing can follow a parallel stage whose branches are not joined"
    return None


def fault_of_beginning(stage: Stage, before: Stage | None) -> str | None:
    """Why `stage` cannot begin after the stage `before`; None if it can.

    After a `kv` join there is no last token to go on from, so the stage has to bring one.
    """
    if isinstance(before, ParallelStage) and before.join == "kv" and not all(p.prefix for p in stage.parts):
        return "a stage after a kv join needs a prefix"
    return None


def fault_of_first_k(first_k: int, branches: int) -> str | None:
    """Why a stage of so many branches cannot join the first `first_k` of them; None if it can."""
    if 0 <= first_k <= branches:
        return None
    return f"first_k can be 1 to {branches}, the number of branches, or 0 for all of them, got {first_k}"


def _check_stages(stages: tuple[Stage, ...], where: str) -> None:
    before: Stage | None = None
    for index, stage in enumerate(stages):
        name = f"{where}.stages[{index}]"
        if not stage.parts:
            raise ValueError(f"{name}: a parallel stage needs at least one branch")
        if any(part.stopping.max_tokens < 1 for part in stage.parts):
            raise ValueError(f"{name}: max_tokens must be at least 1")
        if fault := fault_of_following(before) or fault_of_beginning(stage, before):
            raise ValueError(f"{name}: {fault}")
        if isinstance(stage, ParallelStage):
            if stage.join not in JOINS:
                raise ValueError(f"{name}: join must be one of {', '.join(JOINS)}, got {stage.join!r}")
            if fault := fault_of_first_k(stage.first_k, len(stage.branches)):
                raise ValueError(f"{name}: {fault}")
            for child, spec in enumerate(stage.branches):
                _check_stages(spec.stages, f"{name}.branches[{child}]")
        before = stage
