"""Full collections wait for a good time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from serve.engine.collector import Collector


class Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def collector() -> Iterator[Collector]:
    thresholds = gc.get_threshold()
    made = Collector()
    made.start(now=100.0)
    yield made
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def old_garbage() -> weakref.ref[Knot]:
    knot = Knot()
    gc.collect(1)  # it is not young any more
    return weakref.ref(knot)


def test_a_busy_server_collects_everything_only_after_a_long_time(collector: Collector) -> None:
    garbage = old_garbage()
    collector.busy(100.0 + Collector.LONGEST)
    kept = [[number] for number in range(100_000)]  # collections of young objects run meanwhile
    assert garbage() is not None
    collector.busy(101.0 + Collector.LONGEST)
    assert garbage() is None
    assert len(kept) == 100_000


def test_after_that_it_waits_as_long_again(collector: Collector) -> None:
    collector.busy(101.0 + Collector.LONGEST)
    garbage = old_garbage()
    collector.busy(101.0 + 2 * Collector.LONGEST)
    assert garbage() is not None


def test_an_idle_one_does_at_once(collector: Collector) -> None:
    garbage = old_garbage()
    collector.idle(101.0)
    assert garbage() is None
    another = old_garbage()
    collector.busy(100.0 + Collector.LONGEST)
    assert another() is not None


def test_what_lived_at_the_start_is_not_visited(collector: Collector) -> None:
    assert gc.get_freeze_count() > 1000


def test_garbage_is_not_kept_for_ever() -> None:
    garbage, thresholds = old_garbage(), gc.get_threshold()
    try:
        Collector().start(now=0.0)
        assert garbage() is None
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
