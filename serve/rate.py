"""Tokens per second over the last few seconds, as the engine tells clients and metrics."""

from __future__ import annotations

from collections import deque


class TokenRate:
    """Tokens per second over the last `WINDOW` seconds, by the caller's clock."""

    WINDOW = 5.0

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, now: float, tokens: int) -> None:
        self._recent.append((now, tokens))
        while now - self._recent[0][0] > self.WINDOW:
            self._recent.popleft()

    def per_second(self, now: float) -> float:
        return sum(tokens for at, tokens in self._recent if now - at <= self.WINDOW) / self.WINDOW
