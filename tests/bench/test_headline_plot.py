"""What the first picture of the README is made of."""

from __future__ import annotations

import json

from bench.colors import look
from bench.headline_plot import POLICIES, RESULTS, measured, simulated
from bench.plot import against_load


def test_every_policy_has_a_line_and_a_color_of_its_own() -> None:
    lines = against_load(simulated(json.loads((RESULTS / "maps-h200.json").read_text())), "goodput_stage")
    assert {len(lines[policy]) for policy in POLICIES} == {6}
    assert len({look(policy)["color"] for policy in POLICIES}) == len(POLICIES)
    assert look("taper:paper") == look("taper:paper") != look("taper")


def test_marks_are_of_the_workload_that_the_lines_are_of() -> None:
    runs = [
        {"workload": "headline", "rows": [{"policy": "taper"}]},
        {"workload": "headline-closed", "rows": [{"policy": "off"}]},
    ]
    assert measured(runs) == [{"policy": "taper"}]
