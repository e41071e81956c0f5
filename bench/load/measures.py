"""What a client sees of its requests, and the measures of a run under a policy: one definition for all.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from bench.load.workload import Item
from scheduler.request import Slo
from serve.lateness import CAUSES

SHORT_STAGE = 16
MEASURES = ("mean", "stage", "critical")


@dataclass(slots=True)
class Record:
    """A request as its client sees it. `stage_ends`: when the last token of each of its stages came;
    `refused`: when the server said that it would not serve it."""

    item: Item
    arrival: float
    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    stage_ends: list[float] = field(default_factory=list)
    finished: bool = False
    refused: float | None = None
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
    def latency(self) -> float:
        """Seconds from its arrival to its last token."""
        return self.last - self.arrival

    def on_time(self, slo: Slo) -> bool:
        """Whether it finished, and its first token came within the target."""
        return self.finished and self.ttft <= slo.ttft

    def good(self, slo: Slo, measure: str) -> bool:
        """Whether it was on time, and its TPOT by that measure is within the target too."""
        return self.on_time(slo) and getattr(self, f"{measure}_tpot") <= slo.tpot

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


@dataclass(frozen=True, slots=True)
class Window:
    """Which requests are measured, and for how long: seconds from the start of a run.

    Requests that arrive in [warmup, end) count, and are served to their end; those before them warm the
    server up. One that is not answered `drain` seconds after the end counts as not finished.
    """

    warmup: float = 0.0
    end: float = math.inf
    drain: float = math.inf

    def __contains__(self, at: float) -> bool:
        return self.warmup <= at < self.end

    @property
    def seconds(self) -> float:
        return self.end - self.warmup


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A workload served once under a policy: what clients saw of the requests that arrived in the window.

    slo          the targets that they are held to
    seconds      of the window
    tokens       that came within it, whichever request they were of
    good_tokens  of these, those of requests that met their targets, by the stage measure
    turns        steps, summed over requests, that brought the tokens
    """

    policy: str
    slo: Slo
    seconds: float
    records: Sequence[Record]
    tokens: int
    good_tokens: int
    turns: float

    @property
    def serial_tpots(self) -> list[float]:
        """Seconds a token, of the finished requests without branches."""
        return [each.mean_tpot for each in self.records if each.finished and not each.item.parallel]

    def good(self, measure: str) -> list[bool]:
        """Of each request, whether it finished within its targets; `measure` is mean, stage or critical."""
        return [each.good(self.slo, measure) for each in self.records]

    def row(self) -> dict[str, Any]:
        """Goodput (tokens per second), attainment and the rest; None for a ratio with nothing below."""
        good = {measure: self.good(measure) for measure in MEASURES}
        goodput = {
            measure: sum(each.tokens for each, ok in zip(self.records, flags, strict=True) if ok)
            for measure, flags in good.items()
        }
        parallel = [each.item.parallel for each in self.records]
        stage = [*zip(parallel, good["stage"], strict=True)]
        latencies = [each.latency for each in self.records if each.finished]
        accepted = [ok for each, ok in zip(self.records, good["mean"], strict=True) if each.refused is None]
        return {
            "policy": self.policy,
            **{f"goodput_{measure}": tokens / self.seconds for measure, tokens in goodput.items()},
            **{f"attainment_{measure}": share(flags) for measure, flags in good.items()},
            "serial_attainment": share(ok for wide, ok in stage if not wide),
            "parallel_attainment": share(ok for wide, ok in stage if wide),
            "ttft_attainment": share(each.on_time(self.slo) for each in self.records),
            "refused": share(each.refused is not None for each in self.records),
            "accepted_attainment": share(accepted),
            "e2e_p50_s": quantile(latencies, 0.5),
            "e2e_p99_s": quantile(latencies, 0.99),
            "serial_tpot_p99_ms": quantile([1e3 * tpot for tpot in self.serial_tpots], 0.99),
            "raw_tokens_s": self.tokens / self.seconds,
            "good_tokens_s": self.good_tokens / self.seconds,
            "mean_width": self.tokens / self.turns if self.turns else None,
        }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


# --- the table ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A figure of a row, as tables show it."""

    title: str
    form: str

    def cell(self, value: float | None) -> str:
        return "-" if value is None else self.form.format(value)


COLUMNS = {
    "goodput_mean": Column("goodput mean", "{:.0f}"),
    "attainment_mean": Column("attained", "{:.1%}"),
    "goodput_stage": Column("goodput stage", "{:.0f}"),
    "attainment_stage": Column("attained", "{:.1%}"),
    "goodput_critical": Column("goodput crit.", "{:.0f}"),
    "attainment_critical": Column("attained", "{:.1%}"),
    "serial_attainment": Column("serial", "{:.1%}"),
    "parallel_attainment": Column("parallel", "{:.1%}"),
    "ttft_attainment": Column("TTFT", "{:.1%}"),
    "refused": Column("refused", "{:.1%}"),
    "accepted_attainment": Column("of accepted", "{:.1%}"),
    "raw_tokens_s": Column("raw tok/s", "{:.0f}"),
    "good_tokens_s": Column("good tok/s", "{:.0f}"),
    "mean_width": Column("width", "{:.2f}"),
    "e2e_p50_s": Column("E2E p50 s", "{:.2f}"),
    "e2e_p99_s": Column("E2E p99 s", "{:.2f}"),
    "serial_tpot_p99_ms": Column("serial p99 ms", "{:.1f}"),
    "gap_p99_ms": Column("gap p99 ms", "{:.1f}"),
    **{f"late_{cause}": Column(f"late: {cause}", "{:.2%}") for cause in CAUSES},
}


def titles(figures: Iterable[str], width: int = 14) -> str:
    return "".join(f"{COLUMNS[figure].title:>{width}}" for figure in figures)


def cells(row: Mapping[str, Any], figures: Iterable[str], width: int = 14) -> str:
    return "".join(f"{COLUMNS[figure].cell(row[figure]):>{width}}" for figure in figures)
