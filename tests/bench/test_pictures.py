"""The pictures of the docs: which there are, what they are drawn from, and how they look."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import style
from bench.pictures import LINES, PICTURES, POLICIES, ROOT, measured, simulated
from bench.plot import against_load

TAKEN = {"docs/status.png"}  # by tests/outside/test_status_page.py, in a browser


def shown() -> dict[str, str]:
    """Every picture that a page shows, with the words that stand for it."""
    found: dict[str, str] = {}
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+\.png)\)", page.read_text()):
            found[str((page.parent / target).resolve().relative_to(ROOT))] = words
    return found


def test_a_command_draws_each_picture_that_lies_here_from_files_that_exist() -> None:
    there = {
        str(path.relative_to(ROOT))
        for room in ("docs", "bench/results")
        for path in (ROOT / room).rglob("*.png")
    }
    assert there == PICTURES.keys() | TAKEN
    for name, picture in PICTURES.items():
        for pattern in picture.sources:
            assert [*ROOT.glob(pattern)], f"{name}: {pattern}"


def test_a_page_shows_each_picture_and_says_what_it_shows() -> None:
    words = shown()
    assert words.keys() == PICTURES.keys() | TAKEN
    assert [name for name, said in words.items() if len(said.split()) < 15] == []


def test_every_policy_has_a_line_and_a_color_of_its_own() -> None:
    lines = against_load(simulated(json.loads(LINES.read_text())), "goodput_stage")
    assert {*lines} == {*POLICIES} - {"cap:8"}
    assert {len(points) for points in lines.values()} == {6}
    assert len({style.look(policy)["color"] for policy in POLICIES}) == len(POLICIES)
    assert style.look("taper:paper") == style.look("taper:paper") != style.look("taper")


def test_marks_are_of_the_workload_that_the_lines_are_of() -> None:
    def run(policy: str, **changes: Any) -> dict[str, Any]:
        point = {"load": 1.4, "seed": 1}
        return {"workload": "headline", "points": [point], "rows": [point | {"policy": policy}]} | changes

    runs = [
        run("taper"),
        run("off", workload="headline-closed"),
        run("eager", fork="client"),
        run("cap:4", reject_late=True),
    ]
    assert [row["policy"] for row in measured(runs)] == ["taper"]


@pytest.mark.full
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_with_titles_units_and_its_legend_outside(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = style.begun()
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    PICTURES[name].draw(PICTURES[name].files, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
    (figure,) = kept
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert 1 <= len(panels) <= 4
    for axes in panels:
        assert axes.get_title(loc="left"), name
        assert axes.get_xlabel(), name
        assert axes.get_ylabel(), name
        if axes.get_legend() is not None:
            assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1.0
