"""Admission policies: which ready branches join a step beyond the one that every request advances anyway.

All four see the same candidates and go through the same code before and after.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

from scheduler.predictor import StepLatencyModel


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """A ready branch that could join the step: what it would add to it. Compared by identity.

    key         (request id, branch)
    rows        query rows
    kv_tokens   KV positions that nobody else in the step reads
    """

    key: tuple[str, int]
    rows: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """The step without extras, and what it may cost with them (seconds)."""

    rows: int
    kv_tokens: int
    budget: float


class AdmissionPolicy(Protocol):
    """Chooses among `extras`: the oldest request's come first, of those the least recently advanced.

    What does not fit is left out from the end of the answer.
    """

    @property
    def name(self) -> str: ...
    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]: ...


class Off:
    """Width 1: every request advances one branch a step (IRP-Off)."""

    name = "off"

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        return ()


class Eager:
    """Every ready branch, every step (IRP-Eager)."""

    name = "eager"

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        return extras


class FixedCap:
    """At most `cap` branches of a request, whatever that does to the step (IRP-C)."""

    def __init__(self, cap: int) -> None:
        if cap < 1:
            raise ValueError(f"a cap must be at least 1, got {cap}")
        self.cap = cap
        self.name = f"cap:{cap}"

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        width: Counter[str] = Counter()
        admitted: list[Extra] = []
        for extra in extras:
            request_id, _ = extra.key
            if width[request_id] < self.cap - 1:
                width[request_id] += 1
                admitted.append(extra)
        return admitted


class Taper:
    """As many branches as the budget allows, for utility linear in their number.

    Within a bucket only the KV that a branch adds costs anything. So for each bucket the best choice is the
    longest prefix of the extras, in ascending order of that KV, that fits; the best bucket is the one that
    lets most branches run. This is exact for one-row extras, and O(E log E).
    """

    name = "taper"

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        by_cost = sorted(extras, key=lambda extra: (extra.kv_tokens, extra.rows))
        rows = [*accumulate((extra.rows for extra in by_cost), initial=baseline.rows)]
        kv_tokens = [*accumulate((extra.kv_tokens for extra in by_cost), initial=baseline.kv_tokens)]
        most = 0
        for bucket in latency.buckets:
            in_bucket = bisect_right(rows, bucket)
            in_budget = bisect_right(kv_tokens, baseline.budget, key=partial(latency.predict, bucket))
            most = max(most, min(in_bucket, in_budget) - 1)
        return by_cost[:most]


def policy(name: str) -> AdmissionPolicy:
    """The policy called `off`, `cap:N`, `eager` or `taper`. Raises ValueError."""
    kind, _, cap = name.partition(":")
    if kind == "cap" and cap.isdecimal():
        return FixedCap(int(cap))
    simple: dict[str, AdmissionPolicy] = {"off": Off(), "eager": Eager(), "taper": Taper()}
    if name in simple:
        return simple[name]
    raise ValueError(f"unknown policy {name!r}: choose off, cap:N (N at least 1), eager or taper")
