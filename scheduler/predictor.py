"""How long a step will take: a staircase in the bucket plus a cost per KV token that it reads.

    T = scale * (B[bucket] + c * unique KV tokens),   B ascending, c >= 0

A padded step costs what its bucket costs, so time is flat inside a bucket; KV that rows share is read once,
so it counts once. B and c are measured when the server starts; from then on only `scale` follows the
machine, slowly and within bounds, so that one stalled step does not move it.
"""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.buckets import Buckets


class StepLatencyModel:
    """Predicted seconds of a step."""

    SCALE_BOUNDS = (0.25, 4.0)
    MOST = 0.5  # a larger relative error counts as this: one stalled step says little about the next
    RAISE, LOWER = 0.10, 0.02  # share of a relative error that one step moves the scale by

    def __init__(self, bucket_seconds: Mapping[int, float], kv_token_seconds: float = 0.0) -> None:
        self.buckets = Buckets(bucket_seconds)
        self.kv_token_seconds = max(0.0, kv_token_seconds)
        self.scale = 1.0
        self._seconds: dict[int, float] = {}
        highest = 0.0
        if min(bucket_seconds.values()) <= 0.0:
            raise ValueError(f"a step takes more than 0 seconds, got {dict(bucket_seconds)}")
        for bucket in self.buckets:  # a larger bucket never costs less, whatever the noise of the measurement
            highest = max(highest, bucket_seconds[bucket])
            self._seconds[bucket] = highest

    def predict(self, rows: int, kv_tokens: int) -> float:
        """Seconds of a step of `rows` rows that reads `kv_tokens` distinct KV positions."""
        return self.scale * (self._seconds[self.buckets.fit(rows)] + self.kv_token_seconds * kv_tokens)

    def observe(self, rows: int, kv_tokens: int, seconds: float) -> None:
        """Learn from one finished step: too low a prediction is corrected faster than too high a one."""
        error = min(self.MOST, seconds / self.predict(rows, kv_tokens) - 1.0)
        step = error * (self.RAISE if error > 0 else self.LOWER)
        low, high = self.SCALE_BOUNDS
        self.scale = min(high, max(low, self.scale * (1.0 + step)))
