"""Deadlines, and how much longer than its baseline a step may be.

    T0     = predict(baseline)
    slack  = max(0, min over decoding requests that are not late (deadline - start) - T0)
    budget = max(T0 + rho * slack, F)

A deadline belongs to a request: the time of its last emitted token plus its TPOT target. A request that is
late even at T0 leaves the minimum: it cannot be saved, and must not stop everybody else from widening. If
all are late the slack is 0. F lets ready branches use the padding of the baseline's own bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def slack(deadlines: Iterable[float], start: float, baseline: float) -> float:
    """Seconds by which a step that starts at `start` may exceed `baseline` before a deadline is missed."""
    spare = [deadline - start - baseline for deadline in deadlines]
    return min((s for s in spare if s >= 0.0), default=0.0)


def prompt_deadline(ttft_deadline: float, start: float, tokens_left: int, chunk: int) -> float | None:
    """When the next chunk of a prompt should be done to keep an even pace; None if the target is missed."""
    if ttft_deadline <= start:
        return None
    return start + (ttft_deadline - start) / math.ceil(tokens_left / chunk)


def pace(ttft_deadline: float, start: float, tokens_left: int, step_seconds: float) -> int:
    """Prompt tokens a step should read for the prompt to be done in time, at `step_seconds` a step.

    None are due once the target is missed, or if it is never.
    """
    if ttft_deadline <= start or math.isinf(ttft_deadline):
        return 0
    steps = max(1, int((ttft_deadline - start) / step_seconds))
    return math.ceil(tokens_left / steps)
