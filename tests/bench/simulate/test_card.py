"""The end of the demo: what it simulates, and what it says of it."""

from __future__ import annotations

import io
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from bench.load.measures import Window
from bench.load.workload import Item, Workload, named
from bench.simulate import card
from tests.bench.simulate.shown import FOUND

SMALL = replace(
    card.setting(),
    workload=Workload(
        "hand-made", "poisson", 0, (Item(0.0, 50, ((20,), (30, 40), (20,))), Item(0.1, 9, ((20,),)))
    ),
    window=Window(0.0, 1.0),
)


def test_the_load_is_the_beginning_of_the_one_that_is_compared_on_a_card() -> None:
    long = named("headline", 1, 65.0, rate=1.4)
    assert card.setting().workload.items == tuple(item for item in long.items if item.arrival < 30.0)


def test_an_outcome_is_of_all_answers_and_the_same_every_time() -> None:
    told: list[None] = []
    off = card.outcome(SMALL, "off", on_answer=lambda: told.append(None))
    eager = card.outcome(SMALL, "eager")
    assert len(told) == off.asked == off.kept == 2
    assert off.width == 1.0 < eager.width
    assert off.answer_seconds > eager.answer_seconds > 0.5
    assert off.slowest_ms < 1e3 * SMALL.slo.tpot
    assert card.outcome(SMALL, "eager") == eager
    strict = replace(SMALL, slo=replace(SMALL.slo, tpot=0.001))
    assert card.outcome(strict, "eager").kept == 0


@pytest.mark.parametrize(
    ("kept", "seconds", "speed", "targets"),
    [
        (38, 18.0, "answers as fast as", "and keeps as many promises as"),
        (30, 19.4, "answers as fast as", "but keeps fewer promises than"),
        (38, 40.0, "is slower than", "but keeps as many promises as"),
        (30, 40.0, "is slower than", "and keeps fewer promises than"),
    ],
)
def test_the_last_line_says_what_the_table_says(kept: int, seconds: float, speed: str, targets: str) -> None:
    taper = replace(FOUND["taper"], kept=kept, answer_seconds=seconds)
    found = {**FOUND, "taper": taper}
    assert card.verdict(found) == (
        f"taper {speed} eager ({seconds:.0f} s and 19 s, where off takes 65 s), {targets} off"
        f" ({kept} and 38 of 38, where eager keeps 27)."
    )
    file = io.StringIO()
    Console(file=file, width=80).print(card.table([*found.values()]))
    shown = file.getvalue()
    assert "Simulated: Qwen3-32B on one H200" in shown
    assert (
        f"│ taper: what fits    │ {kept} of 38 │        {seconds:.1f} s │        32.2 ms │      6.0 │"
        in shown
    )


@pytest.mark.full
def test_the_demo_ends_as_the_docs_show() -> None:
    told: list[None] = []
    found = card.outcomes(card.setting(), lambda: told.append(None))
    assert len(told) == 3 * 38
    for policy, each in FOUND.items():
        for name, value in asdict(each).items():
            exact = getattr(found[policy], name)
            assert value == (round(exact, 1) if isinstance(exact, float) else exact), (policy, name)
