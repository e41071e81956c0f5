"""How many KV pages a request can need when it runs alone: it is admitted only if they exist.

A `kv` join keeps all branches resident; with any other join a branch's pages are given back when it ends.
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler.program import BranchSpec, Plan, SerialStage, Stage
from scheduler.request import Request


class _Footprint(NamedTuple):
    """peak: most pages at once; held: pages at the end; tokens: what a `reprefill` join would read again."""

    peak: int
    held: int
    tokens: int


def worst_case_pages(request: Request, page_size: int) -> int:
    """Pages for the prompt and everything that the program may add to it, forks of the model excepted.

    A model-driven fork is checked when it happens, and falls back to serial decoding.
    """
    program = request.program
    if isinstance(program, Plan):
        return _walk(len(request.prompt), program.stages, page_size).peak
    return -(-(len(request.prompt) + program.stopping.max_tokens) // page_size)


def _walk(segment: int, stages: tuple[Stage, ...], page_size: int) -> _Footprint:
    """The footprint of a branch whose segment has `segment` tokens when it begins its stages."""
    closed = peak = 0
    tokens = segment
    for stage in stages:
        if isinstance(stage, SerialStage):
            added = len(stage.prefix) + stage.stopping.max_tokens
            segment, tokens = segment + added, tokens + added
            continue
        closed += -(-segment // page_size)
        branches = [_branch(spec, page_size) for spec in stage.branches]
        peak = max(peak, closed + sum(branch.peak for branch in branches))
        added = sum(branch.tokens for branch in branches)
        tokens += added
        segment = 0
        if stage.join == "kv":
            closed += sum(branch.held for branch in branches)
        elif stage.join == "reprefill":
            segment = added
    closed += -(-segment // page_size)
    return _Footprint(max(peak, closed), closed, tokens)


def _branch(spec: BranchSpec, page_size: int) -> _Footprint:
    first = (
        max(1, len(spec.prefix)) + spec.stopping.max_tokens
    )  # without a prefix it repeats the fork's token
    return _walk(first, spec.stages, page_size)
