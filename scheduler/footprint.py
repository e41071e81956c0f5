"""How many KV pages a request can need when it runs alone: it is admitted only if they exist.

A `kv` join keeps the branches that it joins resident; with any other join a branch's pages are given back
when it ends. The branches of a race all run at once, and any k of them may be joined: the largest count.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest
from typing import NamedTuple

from scheduler.program import ParallelStage, Plan, SerialStage, Stage
from scheduler.request import Request


class _Footprint(NamedTuple):
    """Of one branch and those below it.

    peak    most pages at once
    held    most pages at its end
    tokens  most tokens of its text: what a `reprefill` join would read again
    end     least position after it
    """

    peak: int
    held: int
    tokens: int
    end: int


def worst_case_pages(request: Request, page_size: int, max_context: int) -> int:
    """Pages for the prompt and everything that the program may add to it, forks of the model excepted.

    A model-driven fork is checked when it happens, and falls back to serial decoding.
    """
    program, prompt = request.program, len(request.prompt)
    walk = _Walk(page_size, max_context)
    if isinstance(program, Plan):
        return walk.branch(0, prompt, prompt, program.stages).peak
    return walk.pages(0, prompt + program.stopping.max_tokens)


def _largest(count: int, sizes: Iterable[int]) -> int:
    """What the `count` largest of `sizes` come to."""
    return sum(nlargest(count, sizes))


class _Walk:
    """Goes through a program: all stages sample all that they may, but positions count as if they did not.

    So a segment's length is bounded by its stages, and by what is left of the context after the least that
    must come before it.
    """

    def __init__(self, page_size: int, max_context: int) -> None:
        self._page_size = page_size
        self._max_context = max_context

    def pages(self, start: int, tokens: int) -> int:
        """Pages of a segment that starts at position `start` or later."""
        return -(-min(tokens, max(0, self._max_context - start)) // self._page_size)

    def branch(self, start: int, given: int, tokens: int, stages: tuple[Stage, ...]) -> _Footprint:
        """A branch from position `start` on: `given` tokens, `tokens` with those sampled, then `stages`."""
        closed = peak = 0
        segment, position = tokens, start + given
        for stage in stages:
            if isinstance(stage, SerialStage):
                added = len(stage.prefix) + stage.stopping.max_tokens
                segment, tokens = segment + added, tokens + added
                position += len(stage.prefix)
                continue
            closed += self.pages(start, segment)
            branches = self._branches(position, stage)
            joined = stage.first_k or len(branches)
            peak = max(peak, closed + sum(branch.peak for branch in branches))
            added = _largest(joined, (branch.tokens for branch in branches))
            tokens += added
            start, segment = position, added if stage.join == "reprefill" else 0
            if stage.join == "kv":
                closed += _largest(joined, (branch.held for branch in branches))
                start = position = sorted(branch.end for branch in branches)[joined - 1]
        closed += self.pages(start, segment)
        return _Footprint(max(peak, closed), closed, tokens, position)

    def _branches(self, position: int, stage: ParallelStage) -> list[_Footprint]:
        lead = int(not all(spec.prefix for spec in stage.branches))  # all begin with the fork's last token
        return [
            self.branch(
                position - lead,
                lead + len(spec.prefix),
                lead + len(spec.prefix) + spec.stopping.max_tokens,
                spec.stages,
            )
            for spec in stage.branches
        ]
