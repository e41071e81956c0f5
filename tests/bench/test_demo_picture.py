"""The picture of the demo in the docs. `pytest -m full --pictures docs` takes it anew."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from bench.demo import Demo, ask, serving, simulate
from bench.demo import server_options as options_of
from bench.simulate import card
from tests.bench.simulate.shown import FOUND
from tests.screen import lines, svg

PICTURE = Path(__file__).parents[2] / "docs/demo.svg"


def test_the_picture_ends_as_the_demo_does() -> None:
    """Without running it: the rest is compared where it is run."""
    picture = PICTURE.read_text()
    shown = lines(picture)
    screen = io.StringIO()
    console = Console(file=screen, width=80, highlight=False)
    console.print(card.described(card.setting()))
    console.print(card.table([*FOUND.values()]))
    console.print(card.verdict(FOUND))
    end = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert shown[-len(end) :] == end
    assert picture.count("://") == 2, "two names, and nothing that is fetched"
    assert "font-family: monospace" in picture


@pytest.mark.full
def test_the_picture_is_what_the_demo_shows(request: pytest.FixtureRequest) -> None:
    quiet, console = (Console(file=io.StringIO(), width=80, record=True, highlight=False) for _ in range(2))
    with serving(options_of("default", quiet), quiet) as address:
        ask(address, Demo(), console)
    simulate(console)
    picture = svg(console, "make demo")
    if pictures := request.config.getoption("--pictures"):
        (Path(pictures) / PICTURE.name).write_text(picture)
    was, now = (
        re.sub(r"[\d.]+", "0", " ".join(lines(each)).strip()) for each in (PICTURE.read_text(), picture)
    )
    assert re.sub(r"\s+", " ", now) == re.sub(r"\s+", " ", was), "but for how fast it was"
