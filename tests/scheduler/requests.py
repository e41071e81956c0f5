"""Requests whose prompts are letters, in a word each: what most of the scheduler's tests serve."""

from __future__ import annotations

from typing import Any

from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, Stage
from scheduler.request import Request, Slo
from scheduler.stopping import Stopping
from tests.scheduler.alphabet import LETTERS
from tests.scheduler.strategies import RELAXED


def stopping(tokens: int) -> Stopping:
    return Stopping(max_tokens=tokens)


def serial(tokens: int, prefix: tuple[int, ...] = ()) -> SerialStage:
    return SerialStage(stopping=stopping(tokens), prefix=prefix)


def fork(width: int, tokens: int = 6, join: str = "none", stages: tuple[Stage, ...] = ()) -> ParallelStage:
    spec = BranchSpec(stopping=stopping(tokens), prefix=LETTERS[:1], stages=stages)
    return ParallelStage(branches=(spec,) * width, join=join)


def request(name: str, *stages: Stage, prompt: int = 4, slo: Slo = RELAXED, **more: Any) -> Request:
    ids = tuple(LETTERS[n % len(LETTERS)] for n in range(prompt))
    return Request(id=name, prompt=ids, program=Plan(stages=stages), slo=slo, **more)
