"""Deadlines, and how much longer than its baseline a step may be.

    T0     = predict(baseline)
    slack  = max(0, min over decoding requests that are not late (deadline - start) - T0)
    budget = max(T0 + rho * slack, F)

A deadline belongs to a request: the time of its last emitted token plus its TPOT target. A request that is
late even at T0 leaves the minimum: it cannot be saved, and must not stop everybody else from widening. If
all are late the slack is 0. F lets ready branches use the padding of the baseline's own bucket.

A deadline so defined forgets: what a fork, a join or a slow step took is never made up for, and has to be
provided for by a margin (rho below 1, or the quantile of past errors) in every step. Instead, a request that
fell behind its pace is due earlier by a share of its debt, until it has caught up. That is a controller with
an integral part: it needs no margin, and forgives a predictor that is a few percent off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

AIM = 0.98  # pace that a request is held to, in TPOT targets: what is left covers the debt that it ends with
MOST_REPAID = 0.1  # of a TPOT target, by which a token may be due earlier


def token_deadline(last: float, tpot: float, ahead: float, repay: float) -> float:
    """When the token after the one at `last` is due.

    ahead  seconds by which that one came sooner than the pace that the request is held to (negative: later)
    repay  tokens within which a request that is behind its pace catches up; 0: it never does
    """
    if math.isinf(tpot):
        return math.inf
    if ahead >= 0.0 or not repay:
        return last + tpot
    return last + tpot - min(-ahead / repay, MOST_REPAID * tpot)


def slack(deadlines: Iterable[float], start: float, baseline: float, margin: float = 0.0) -> float:
    """Seconds by which a step that starts at `start` may exceed `baseline` before a deadline is missed.

    `margin`: the share by which steps may take longer than predicted.
    """
    left = [deadline - start for deadline in deadlines]
    return max(0.0, min((each for each in left if each >= baseline), default=0.0) / (1.0 + margin) - baseline)


def prompt_deadline(ttft_deadline: float, start: float, tokens_left: int, chunk: int) -> float | None:
    """When the next chunk of a prompt should be done to keep an even pace; None if the target is missed."""
    if ttft_deadline <= start:
        return None
    return start + (ttft_deadline - start) / math.ceil(tokens_left / chunk)


def prompt_pace(ttft_deadline: float, start: float, tokens_left: int, step_seconds: float) -> int:
    """Prompt tokens a step should read for the prompt to be done in time, at `step_seconds` a step.

    None are due once the target is missed, or if it is never.
    """
    if ttft_deadline <= start or math.isinf(ttft_deadline):
        return 0
    steps = max(1, int((ttft_deadline - start) / step_seconds))
    return math.ceil(tokens_left / steps)
