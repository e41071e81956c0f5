from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from bench import timing
from bench.timing import Stopwatch, median_seconds, no_collections, seconds, seconds_per_call, spread


class Clock:
    """A clock that calls move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *times: float) -> Callable[..., None]:
        """A call that takes these seconds in turn."""
        left = iter(times)

        def call(*_: object) -> None:
            self.now += next(left)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "clock", made)
    return made


def test_a_median_is_of_the_calls_after_those_that_warm_up(clock: Clock) -> None:
    assert seconds(clock.takes(2.0)) == 2.0
    assert median_seconds(clock.takes(90.0, 80.0, 1.0, 4.0, 3.0), repeats=3, warmup=2) == 3.0


def test_a_chain_is_timed_by_call_and_each_takes_what_the_one_before_gave(clock: Clock) -> None:
    def step(x: int) -> int:
        clock.now += 0.5
        return x + 1

    assert seconds_per_call(step, 0, calls=4, repeats=3) == (0.5, 12)


def test_a_stopwatch_adds_up_by_name_until_it_is_read(clock: Clock) -> None:
    class Engine:
        update = staticmethod(clock.takes(1.0, 2.0, 5.0))
        schedule = staticmethod(clock.takes(10.0))

    engine, watch = Engine(), Stopwatch()
    watch.on(engine, "update", "schedule")
    engine.update()
    engine.update()
    engine.schedule()
    assert watch.take() == {"update": 3.0, "schedule": 10.0}
    engine.update()
    assert watch.calls == {"update": [5.0]}
    assert watch.spreads()["update"]["median_ms"] == 5000.0


def test_a_spread_is_a_median_and_what_one_in_a_hundred_exceeds() -> None:
    assert spread([*range(101)]) == {"median_ms": 50e3, "p99_ms": 99e3}


def test_the_garbage_collector_comes_back() -> None:
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
