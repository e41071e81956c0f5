"""How long a step will take: seconds for its rows, and seconds for what it reads.

    T = scale * (B(rows) + c_shared * shared KV + c_private * private KV + c_items * items
                 + c_chunk * chunk context + c_raw * raw KV) + offset + offset of the bucket

B ascends and no c is negative. The default is a staircase: a padded step costs what its bucket costs, so B is
flat inside a bucket; KV that rows share is read once, so it counts once (c_raw = 0). The other forms, a line
in the rows and in the raw KV or a constant per row, are there to be compared with.

B and the c's are measured beforehand. Online, the offsets follow the machine, and the scale where larger
steps are off by more than small ones; all within bounds, and by the median of recent steps, so that a stalled
one moves nothing. A line knows of no buckets, and has no offsets for them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median_high
from typing import Any, NamedTuple

from scheduler.buckets import Buckets


class StepLoad(NamedTuple):
    """What a step computes and reads.

    rows           query rows
    shared_kv      KV positions of segments that are only read, each counted once
    private_kv     KV positions of segments that are written
    items          segments read
    chunk_context  sum over the rows after an entry's first of the positions that the row sees
    raw_kv         positions that entries read, counted for each entry
    """

    rows: int
    shared_kv: int = 0
    private_kv: int = 0
    items: int = 0
    chunk_context: int = 0
    raw_kv: int = 0

    @property
    def kv_tokens(self) -> int:
        """Different KV positions read."""
        return self.shared_kv + self.private_kv

    def plus(self, other: StepLoad) -> StepLoad:
        """Both, reading nothing in common."""
        return StepLoad(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds for each unit of a load, beside its rows. Negative ones count as 0."""

    shared_kv: float = 0.0
    private_kv: float = 0.0
    items: float = 0.0
    chunk_context: float = 0.0
    raw_kv: float = 0.0


class PredictionAccuracy(NamedTuple):
    """How well recent steps were predicted: r = measured / predicted - 1.

    bias  mean of r; mape, mean of |r|; coverage, share of steps within predicted * (1 + margin at the time)
    """

    bias: float = 0.0
    mape: float = 0.0
    coverage: float = 1.0


class Accuracy:
    """Running statistics of the predictions of the last WINDOW steps."""

    WINDOW = 256
    LEAST = 32  # steps before the quantile is taken from them
    QUANTILE = 0.95
    MARGIN_BOUNDS = (0.0, 0.25)

    def __init__(self, margin: float) -> None:
        self._initial = margin
        self._recent: deque[tuple[float, bool]] = deque()
        self._within = 0  # of the recent ones
        self._sorted: list[float] = []

    def observe(self, error: float) -> None:
        within = error <= self.margin
        self._recent.append((error, within))
        self._within += within
        insort(self._sorted, error)
        if len(self._recent) > self.WINDOW:
            oldest, was_within = self._recent.popleft()
            self._within -= was_within
            del self._sorted[bisect_left(self._sorted, oldest)]

    @property
    def margin(self) -> float:
        """The quantile of r, which a step seldom exceeds."""
        if len(self._sorted) < self.LEAST:
            return self._initial
        low, high = self.MARGIN_BOUNDS
        return min(high, max(low, self._sorted[int(self.QUANTILE * (len(self._sorted) - 1))]))

    def snapshot(self) -> PredictionAccuracy:
        steps = len(self._recent)
        if not steps:
            return PredictionAccuracy()
        size = sum(map(abs, self._sorted)) / steps
        return PredictionAccuracy(sum(self._sorted) / steps, size, self._within / steps)


class StepLatencyModel:
    """Predicted seconds of a step."""

    SCALE_BOUNDS = (0.5, 2.0)
    OFFSET_BOUNDS = (-0.25, 4.0)  # times the smallest bucket's seconds
    BUCKET_OFFSET = 0.1  # times the bucket's seconds, either way
    RECENT = 18  # steps from whose medians the offset and the scale are corrected; half as many in a bucket
    LEAST_SPREAD = 0.1  # of the sizes of recent steps, below which they say nothing of the scale
    MOST = 0.5  # a larger relative error counts as this
    RAISE, LOWER = 0.2, 0.1  # share of an error by which a step corrects the offset
    BUCKET_SHARE, SCALE_SHARE = 0.25, 0.1  # the same for a bucket's own offset and for the scale

    def __init__(
        self,
        bucket_seconds: Mapping[int, float],
        kv_token_seconds: float = 0.0,
        *,
        costs: Costs | None = None,
        row_seconds: Callable[[int], float] | None = None,
        margin: float = 0.05,
    ) -> None:
        """A staircase over `bucket_seconds`, every KV token at one price unless `costs` tell more.

        `row_seconds` replaces the staircase; the buckets stay those that steps are padded to. `margin` is
        what a step may take longer than predicted until enough have been seen.
        """
        if min(bucket_seconds.values()) <= 0.0:
            raise ValueError(f"a step takes more than 0 seconds, got {dict(bucket_seconds)}")
        self.buckets = Buckets(bucket_seconds)
        costs = costs or Costs(shared_kv=kv_token_seconds, private_kv=kv_token_seconds)
        self._costs = tuple(
            max(0.0, cost)
            for cost in (costs.shared_kv, costs.private_kv, costs.items, costs.chunk_context, costs.raw_kv)
        )
        self.accuracy = Accuracy(margin)
        self.scale = 1.0
        self.offset = 0.0
        self._bucket: list[int] = []  # by rows: which bucket holds them
        self._base: list[float] = []  # by rows, as measured: never falling, whatever the noise
        for rows in range(self.buckets.largest + 1):
            bucket = self.buckets.fit(max(1, rows))
            seconds = row_seconds(rows) if row_seconds else bucket_seconds[bucket]
            self._bucket.append(bucket)
            self._base.append(max(seconds, self._base[-1]) if self._base else seconds)
        self._is_staircase = row_seconds is None
        self._offsets = dict.fromkeys(self.buckets, 0.0)
        self._steps = dict.fromkeys(self.buckets, 0.0)  # the offsets as they are used
        self._recent: deque[_Step] = deque(maxlen=self.RECENT)
        self._recent_in = {bucket: deque[_Step](maxlen=self.RECENT // 2) for bucket in self.buckets}

    @classmethod
    def from_profile(
        cls, profile: Mapping[str, Any], buckets: Iterable[int] | None = None, form: str = "staircase"
    ) -> StepLatencyModel:
        """A fitted form of a profile, as bench.device.calibrate writes them, for `buckets` (its own if None).

        A bucket that was not measured costs what the next larger measured one does. Raises ValueError for a
        bucket that is larger than all of them.
        """
        fitted = profile["forms"][form]
        steps = fitted.get("buckets") or profile["forms"]["staircase"]["buckets"]
        measured = {int(rows): seconds for rows, seconds in steps.items()}
        known = Buckets(measured)
        line = fitted.get("line")
        return cls(
            {rows: measured[known.fit(rows)] for rows in buckets or known},
            costs=Costs(**fitted["costs"]),
            row_seconds=None if line is None else lambda rows: line[0] + line[1] * rows,
            margin=fitted["margin"],
        )

    # --- predicting ------------------------------------------------------------------------------------

    def predict(self, load: StepLoad) -> float:
        """Seconds of a step. Raises IndexError beyond the largest bucket."""
        return self.rows_seconds(load.rows) + self.reading_seconds(load)

    def rows_seconds(self, rows: int) -> float:
        """Seconds of a step that reads nothing; never falling in `rows`."""
        return self.scale * self._base[rows] + self.offset + self._steps[self._bucket[rows]]

    def reading_seconds(self, load: StepLoad) -> float:
        """What the load costs beside its rows: additive over parts that read nothing in common."""
        shared, private, items, chunk, raw = self._costs
        return self.scale * (
            shared * load.shared_kv
            + private * load.private_kv
            + items * load.items
            + chunk * load.chunk_context
            + raw * load.raw_kv
        )

    def row_line(self, context: int) -> tuple[float, float]:
        """(a, b): one row whose `context` ancestor positions are read already costs a + b * its own ones."""
        _, private, item, _, raw = self._costs
        return self.scale * (item + raw * context), self.scale * (private + raw)

    # --- learning --------------------------------------------------------------------------------------

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from one finished step: too low a prediction is corrected faster than too high a one."""
        self.accuracy.observe(seconds / self.predict(load) - 1.0)
        bucket = self._bucket[load.rows]
        step = _Step(self._base[load.rows] + self.reading_seconds(load) / self.scale, bucket, seconds)
        for recent in (self._recent, self._recent_in[bucket]):
            recent.append(step)
        if len(self._recent) == self.RECENT:
            self._correct(sorted(self._recent))
        if self._is_staircase and len(self._recent_in[bucket]) == self.RECENT // 2:
            most = self.BUCKET_OFFSET * self._base[bucket]
            error = self._median_error(self._recent_in[bucket])
            moved = self._offsets[bucket] + self.BUCKET_SHARE * self._step_towards(error, bucket)
            self._offsets[bucket] = min(most, max(-most, moved))
        self._keep_ascending()

    def _median_error(self, steps: Iterable[_Step]) -> float:
        """Seconds by which `steps` take longer than is predicted now."""
        return median_high(
            step.seconds - self.scale * step.device - self.offset - self._steps[step.bucket] for step in steps
        )

    def _step_towards(self, error: float, bucket: int) -> float:
        most = self.MOST * self._base[bucket]
        return min(most, error) * self.RAISE if error > 0.0 else max(-most, error) * self.LOWER

    def _correct(self, steps: list[_Step]) -> None:
        """Move the offset by what steps are off; turn the line where the larger ones are off by more.

        What the offset has no room for goes to the scale.
        """
        half = len(steps) // 2
        small, large = self._median_error(steps[:half]), self._median_error(steps[half:])
        between, middle = steps[half + half // 2].device - steps[half // 2].device, steps[half].device
        turn = 0.0
        if between > self.LEAST_SPREAD * middle:
            limit = self.MOST * between
            turn = self.SCALE_SHARE * min(limit, max(-limit, large - small)) / between
        low, high = self.SCALE_BOUNDS
        turn = min(high, max(low, self.scale + turn)) - self.scale
        wanted = self.offset - turn * middle + self._step_towards((small + large) / 2, steps[half].bucket)
        lowest, highest = (bound * self._base[0] for bound in self.OFFSET_BOUNDS)
        self.offset = min(highest, max(lowest, wanted))
        self.scale = min(high, max(low, self.scale + turn + (wanted - self.offset) / middle))

    def _keep_ascending(self) -> None:
        """A larger bucket never costs less, whatever was seen of it."""
        above = -math.inf  # seconds at the end of the bucket before
        first = 0
        for bucket, offset in self._offsets.items():
            self._steps[bucket] = max(offset, above - self.scale * self._base[first])
            above = self.scale * self._base[bucket] + self._steps[bucket]
            first = bucket + 1


class _Step(NamedTuple):
    """A finished step: what the unscaled model says, its bucket, and what it took."""

    device: float
    bucket: int
    seconds: float
