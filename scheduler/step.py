"""The contract between the scheduler and whoever runs its steps: a Step out, a StepResult back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.predictor import StepLoad
from scheduler.sampling import SamplingParams


class SegmentRead(NamedTuple):
    """A KV segment as a step reads it: its pages, and how many positions are filled after the step's writes.

    All pages but the last are full. The scheduler gives page ids as an array of 32-bit integers, which NumPy
    takes over at once; nobody writes to it.
    """

    pages: Sequence[int]
    length: int


class Entry(NamedTuple):
    """Consecutive tokens of one segment to be computed in a step; a segment has at most one entry in it.

    A named tuple: hundreds are made in each step, and a frozen dataclass takes thrice as long to make.

    tokens   ids to feed, or None: one token, the last one sampled in `slot`
    start    rotary position of the first token; the sampled token has position start + rows
    ordinal  index of the first token inside its segment: it is written to
             own.pages[ordinal // page_size] at offset ordinal % page_size
    context  the segment's ancestors, root first; they are read whole
    own      the segment itself; row i reads its positions up to ordinal + i
    samples  whether the last row's logits choose a token; `slot` is set only then
    path     (stage, child) pairs from the root: with the seed and the position, the key of the sample
    """

    request_id: str
    branch: int
    segment: int
    slot: int | None
    start: int
    ordinal: int
    rows: int
    tokens: tuple[int, ...] | None
    context: tuple[SegmentRead, ...]
    own: SegmentRead
    samples: bool
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SlotSetup:
    """A slot changes hands before the step runs.

    `given` and `generated` are the ids at every position before the next sampled one; filled only where
    `sampling.uses_penalties`. From then on, each token fed to the slot by reference to the slot, or by a
    later one-row entry that samples, counts as generated.
    """

    slot: int
    sampling: SamplingParams
    given: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What a runner runs: rows to compute, in the order in which their samples come back.

    slots   slots that change hands before it
    bucket  padded row count
    """

    step_id: int
    entries: tuple[Entry, ...]
    slots: tuple[SlotSetup, ...]
    bucket: int

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the controller thought of a step when it was planned.

    load              what the step's time depends on (scheduler.predictor)
    seconds           predict(load); baseline_seconds, predict(the forced part of it)
    budget_seconds    what `seconds` may reach by adding extra work
    deferred          runnable branches that sit the step out, as (request id, branch)
    """

    load: StepLoad
    seconds: float
    baseline_seconds: float
    budget_seconds: float
    deferred: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What the scheduler decided: what to run, and what it expects of it."""

    step: Step
    forecast: Forecast


class Sample(NamedTuple):
    """A sampled token; log-probabilities (natural) are of the model's raw distribution, where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced: one sample for each entry that samples, in their order, and how long it took."""

    step: Step
    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that has run: what it was, what was expected of it, and the seconds that it took."""

    step: Step
    forecast: Forecast
    seconds: float
