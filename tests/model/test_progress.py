"""A long load is told of now and then, and a short one not at all."""

from __future__ import annotations

from model.progress import EVERY, SaidSometimes


def test_what_is_loaded_is_said_once_in_a_while() -> None:
    now, said = 0.0, list[str]()
    watch = SaidSometimes(said.append, clock=lambda: now)
    for tenth in range(1, 11):
        now = tenth * 0.3 * EVERY
        watch(tenth * 10**9, 10 * 10**9)
    assert said == ["4.0 of 10.0 GB", "8.0 of 10.0 GB"]


def test_what_is_over_at_once_is_not_told_of() -> None:
    said = list[str]()
    watch = SaidSometimes(said.append, clock=lambda: 0.0)
    watch(10, 10)
    assert said == []
