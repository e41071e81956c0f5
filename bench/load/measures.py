"""What a client sees of its requests, and the measures of a policy: one definition for all benchmarks.

On the client's clock: t1 is the first token, tE the last, N their number. Stage s ends with its last token at
c_s and begins where the one before it ended, b_s (the first: at t1); it brings n_s tokens over branches the
longest of which has m_s (the first: one less each). Stages under 16 tokens are merged into the next.

    mean TPOT      (tE - t1) / (N - 1)
    stage TPOT     max over stages of (c_s - b_s) / n_s
    critical TPOT  max over stages of (c_s - b_s) / m_s

A request is good if it finished, met its TTFT target, and its measure is within the TPOT target. Goodput is
the tokens of good requests per second. The denominator of attainment is everything that arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from bench.load.workload import Item

SHORT_STAGE = 16


@dataclass(slots=True)
class Record:
    """A request as its client sees it. `stage_ends`: when the last token of each of its stages came."""

    item: Item
    arrival: float
    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    stage_ends: list[float] = field(default_factory=list)
    finished: bool = False
    _ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._ends = [*accumulate(sum(stage) for stage in self.item.stages)]

    def emit(self, now: float, tokens: int = 1) -> None:
        """More tokens came. Stages follow one another, so that counting tells which ones they end."""
        if not self.tokens:
            self.first = now
        self.last = now
        self.tokens += tokens
        while len(self.stage_ends) < len(self._ends) and self.tokens >= self._ends[len(self.stage_ends)]:
            self.stage_ends.append(now)

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def mean_tpot(self) -> float:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def stage_tpot(self) -> float:
        return max((stage.seconds / stage.tokens for stage in merged_stages(self) if stage.tokens), default=0)

    @property
    def critical_tpot(self) -> float:
        stages = merged_stages(self)
        return max((stage.seconds / stage.longest for stage in stages if stage.longest), default=0)


class Stage(NamedTuple):
    """When it began and ended, how many tokens it brought, and how many on its longest branch."""

    begin: float
    end: float
    tokens: int
    longest: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def merged_stages(record: Record) -> list[Stage]:
    """The stages of a finished request; a short one counts with the next, a short last one with the last.

    The very first token begins the first stage, and is not counted.
    """
    stages: list[Stage] = []
    begin, tokens, longest = record.first, -1, -1
    for lengths, end in zip(record.item.stages, record.stage_ends, strict=True):
        tokens, longest = tokens + sum(lengths), longest + max(lengths)
        if tokens + (not stages) >= SHORT_STAGE:
            stages.append(Stage(begin, end, tokens, longest))
            begin, tokens, longest = end, 0, 0
    if stages and tokens:
        last = stages.pop()
        stages.append(Stage(last.begin, record.last, last.tokens + tokens, last.longest + longest))
    elif not stages:
        stages.append(Stage(begin, record.last, tokens, longest))
    return stages


def share(flags: Iterable[bool]) -> float | None:
    """How many of `flags` are true, as a share; None if there are none."""
    values = [*flags]
    return sum(values) / len(values) if values else None


def quantile(values: Sequence[float], q: float) -> float | None:
    """None if there are no values."""
    return float(np.quantile(values, q)) if values else None


def client_row(
    records: Sequence[Record], seconds: float, *, tpot_slo: float, ttft_slo: float
) -> dict[str, Any]:
    """Goodput (tokens per second of a window of `seconds`) and attainment of what arrived in the window."""
    on_time = [record.finished and record.ttft <= ttft_slo for record in records]
    finished = [record for record in records if record.finished]
    parallel = [record.item.parallel for record in records]

    def good(tpot: Callable[[Record], float]) -> list[bool]:
        return [ok and tpot(record) <= tpot_slo for record, ok in zip(records, on_time, strict=True)]

    def goodput(flags: Sequence[bool]) -> float:
        return sum(record.tokens for record, ok in zip(records, flags, strict=True) if ok) / seconds

    measures = {name: good(attrgetter(f"{name}_tpot")) for name in ("mean", "stage", "critical")}
    stage = [*zip(parallel, measures["stage"], strict=True)]
    latencies = [record.last - record.arrival for record in finished]
    serial_ms = [1e3 * record.mean_tpot for record in finished if not record.item.parallel]
    return {
        **{f"goodput_{name}": goodput(flags) for name, flags in measures.items()},
        **{f"attainment_{name}": share(flags) for name, flags in measures.items()},
        "serial_attainment": share(ok for wide, ok in stage if not wide),
        "parallel_attainment": share(ok for wide, ok in stage if wide),
        "ttft_attainment": share(on_time),
        "e2e_p50_s": quantile(latencies, 0.5),
        "e2e_p99_s": quantile(latencies, 0.99),
        "serial_tpot_p99_ms": quantile(serial_ms, 0.99),
    }
