"""How calls are timed: one by one, in a row, or wherever a stopwatch was put on them."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

clock = time.perf_counter


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    started = clock()
    call()
    return clock() - started


def median_seconds(call: Callable[[], Any], repeats: int, warmup: int = 5) -> float:
    """Of `repeats` calls, after a few that warm up."""
    return statistics.median([seconds(call) for _ in range(warmup + repeats)][warmup:])


def seconds_per_call(call: Callable[[Any], Any], carry: Any, calls: int, repeats: int) -> tuple[float, Any]:
    """Median over `repeats` of the wall time of a chain of calls on the device, per call; the last carry.

    Each call takes the result of the one before it; the chain is queued at once and then waited for.
    """
    import jax

    def chain() -> None:
        nonlocal carry
        for _ in range(calls):
            carry = call(carry)
        jax.block_until_ready(carry)

    jax.block_until_ready(carry)
    return median_seconds(chain, repeats, warmup=0) / calls, carry


def python_ms(repeats: int = 9) -> float:
    """How fast this host's Python is: median milliseconds of a fixed loop."""

    def loop() -> int:
        total = 0
        for number in range(200_000):
            total += number % 7
        return total

    return 1e3 * median_seconds(loop, repeats, warmup=1)


@contextmanager
def no_collections() -> Iterator[None]:
    """Keeps the garbage collector out of what is timed, as the engine does in production."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Stopwatch:
    """Seconds of the calls that it was put on, by name and in order."""

    def __init__(self) -> None:
        self.calls: defaultdict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed under this name."""

        def timed(*arguments: Any, **options: Any) -> Any:
            started = clock()
            result = call(*arguments, **options)
            self.calls[name].append(clock() - started)
            return result

        return timed

    def on(self, owner: Any, *methods: str) -> None:
        """Time these methods of an object, each under its own name, from now on."""
        for method in methods:
            setattr(owner, method, self.timed(method, getattr(owner, method)))

    def take(self) -> dict[str, float]:
        """What each name's calls came to since the last taking."""
        taken = {name: sum(calls) for name, calls in self.calls.items()}
        self.calls.clear()
        return taken

    def spreads(self) -> dict[str, dict[str, float]]:
        return {name: spread(calls) for name, calls in self.calls.items()}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
    }
