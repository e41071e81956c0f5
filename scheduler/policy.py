"""Admission policies: which ready branches join a step beyond the one that every request advances anyway.

All four see the same candidates and go through the same code before and after.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import ClassVar, NamedTuple, Protocol

from scheduler.predictor import StepLatencyModel


class Extra(NamedTuple):
    """A ready branch that could join the step: what it would add to it.

    candidate  which one it is
    group      number of its request: the oldest one has the lowest
    rows       query rows
    seconds    predicted seconds beside the rows
    priority   of its request: higher is more urgent
    """

    candidate: int
    group: int
    rows: int
    seconds: float
    priority: int = 0


class Baseline(NamedTuple):
    """The step without extras: rows, and seconds beside the rows; and what it may cost with extras."""

    rows: int
    seconds: float
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
        width: Counter[int] = Counter()
        admitted: list[Extra] = []
        for extra in extras:
            if width[extra.group] < self.cap - 1:
                width[extra.group] += 1
                admitted.append(extra)
        return admitted


Order = Callable[[Sequence[Extra]], list[Extra]]


def cheapest_first(extras: Sequence[Extra]) -> list[Extra]:
    """For utility linear in the number of branches."""
    return sorted(extras, key=attrgetter("seconds", "rows"))


def oldest_first(extras: Sequence[Extra]) -> list[Extra]:
    """First come, first served: as many branches of the oldest request as it has, then the next one's."""
    return [*extras]


def level_by_level(extras: Sequence[Extra]) -> list[Extra]:
    """For concave utility: one branch of every request before a second one of any, cheapest first."""
    width: Counter[int] = Counter()
    levels: list[tuple[int, float, Extra]] = []
    for extra in extras:
        levels.append((width[extra.group], extra.seconds, extra))
        width[extra.group] += 1
    return [extra for _, _, extra in sorted(levels)]


def most_urgent_first(extras: Sequence[Extra]) -> list[Extra]:
    """By the priority of their requests; of equal ones, the oldest first."""
    return sorted(extras, key=attrgetter("priority"), reverse=True)


class Taper:
    """As many branches as the budget allows, in a given order.

    Predicted time never falls as branches join, so the most that fit are found by bisection. With the
    cheapest first no other choice of one-row extras admits more; but the oldest request first serves more
    over time, since who is done gives back its KV. O(E log E).
    """

    ORDERS: ClassVar[dict[str, Order]] = {
        "fcfs": oldest_first,
        "linear": cheapest_first,
        "concave": level_by_level,
        "priority": most_urgent_first,
    }

    def __init__(self, order: str = "fcfs") -> None:
        self.name = "taper" if order == "fcfs" else f"taper:{order}"
        self._order = self.ORDERS[order]

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        if not extras:
            return ()
        ordered = self._order(extras)
        _, _, added_rows, added_seconds, _ = zip(*ordered, strict=True)
        rows = [*accumulate(added_rows, initial=baseline.rows)]
        seconds = [*accumulate(added_seconds, initial=baseline.seconds)]
        fit = bisect_right(rows, latency.buckets.largest)

        def predicted(count: int) -> float:
            return latency.rows_seconds(rows[count]) + seconds[count]

        return ordered[: max(0, bisect_right(range(fit), baseline.budget, key=predicted) - 1)]


class Greedy:
    """The literal loop of the paper (arXiv 2605.06914, algorithm 1), with its linear utility.

    Of the branch that is next in each request, the one with the most utility per second joins, and so on; a
    request whose next one does not fit is out. O(E * groups).
    """

    name = "taper:paper"

    def admit(
        self, extras: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel
    ) -> Sequence[Extra]:
        queues: dict[int, deque[Extra]] = {}
        for extra in extras:
            queues.setdefault(extra.group, deque()).append(extra)
        admitted: list[Extra] = []
        rows, seconds = baseline.rows, baseline.seconds
        while queues:
            now = latency.rows_seconds(rows) + seconds
            best, highest = -1, 0.0
            for group, queue in [*queues.items()]:
                extra = queue[0]
                if rows + extra.rows > latency.buckets.largest:
                    del queues[group]
                    continue
                then = latency.rows_seconds(rows + extra.rows) + seconds + extra.seconds
                if then > baseline.budget:
                    del queues[group]
                elif (score := 1.0 / (1e-9 + then - now)) > highest:
                    best, highest = group, score
            if best < 0:
                break
            extra = queues[best].popleft()
            admitted.append(extra)
            rows, seconds = rows + extra.rows, seconds + extra.seconds
            if not queues[best]:
                del queues[best]
        return admitted


def policy(name: str) -> AdmissionPolicy:
    """The policy of that name: `off`, `cap:N`, `eager`, `taper` or `taper:OPTION`. Raises ValueError."""
    kind, _, option = name.partition(":")
    if kind == "cap" and option.isdecimal():
        return FixedCap(int(option))
    if kind == "taper" and option in Taper.ORDERS:
        return Taper(option)
    simple: dict[str, AdmissionPolicy] = {
        "off": Off(),
        "eager": Eager(),
        "taper": Taper(),
        "taper:paper": Greedy(),
    }
    if name in simple:
        return simple[name]
    raise ValueError(
        f"unknown policy {name!r}: choose off, cap:N (N at least 1), eager, taper, or taper:linear,"
        " taper:concave, taper:priority, taper:paper"
    )
