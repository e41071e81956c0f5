"""The figures of docs/results.md are those of the files that it names."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
PAGE = (ROOT / "docs/results.md").read_text()


def rows(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """By policy, in the order of seeds."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in RESULTS.glob(pattern):
        for row in json.loads(path.read_text())["rows"]:
            found[row["policy"]].append(row)
    return {policy: sorted(own, key=lambda row: row["seed"]) for policy, own in found.items()}


def shown(figures: list[float], times: int) -> str:
    return " / ".join(f"{times * figure:.0f}" for figure in figures)


def cells(policy: str) -> list[str]:
    """Of its row in the first table."""
    (row,) = re.findall(rf"^\| {policy} \| (.+) \|$", PAGE, re.MULTILINE)
    return [cell.strip(" *") for cell in row.split("|")]


@pytest.mark.parametrize("pattern", ["goodput-h200-open*.json", "goodput-h200-closed*.json"])
def test_the_policies_have_what_was_measured(pattern: str) -> None:
    first = 0 if "open" in pattern else 2
    found = rows(pattern)
    assert len(found) >= 3
    for policy, own in found.items():
        goodput, attained = cells(policy)[first : first + 2]
        assert goodput == shown([row["goodput_stage"] for row in own], 1), policy
        assert attained == shown([row["attainment_stage"] for row in own], 100), policy


def over_the_best_peer(case: dict[str, Any]) -> float:
    peers = [figure for name, figure in case.items() if re.fullmatch(r"flashinfer_\w+_us", name)]
    return min(peers) / case["ours_us"]


def of_file(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def test_the_speeds_are_those_of_their_files() -> None:
    table = dict(re.findall(r"^\| (.+?) \| ([^|]*\d[^|]*) \| `[^|]+ \|$", PAGE, re.MULTILINE))
    engine, generate = of_file("engine-h200-qwen3-32b.json"), of_file("generate-h200-qwen3-8b-merged.json")
    one, two = (of_file(f"step-h200x2-qwen3-32b{name}.json")["cases"][0] for name in ("-one", ""))
    predictor = of_file("predictor-h200-qwen3-32b.json")["end_to_end"]
    cases = [case for case in of_file("kernels-h200.json")["cases"] if case["suite"] == "shared"]
    expected = [
        f"{geometric_mean(map(over_the_best_peer, cases)):.2f} times as fast",
        f"{engine['ready_s']:.0f} s;",
        f"{engine['wall']['median_ms']:.1f} ms; {engine['floor_ms']:.1f} ms",
        f"{generate['taper']['tokens_per_second']:,.0f} tokens/s, {generate['ratio']:.2f} times as many",
        f"{generate['share_of_floor']:.2f}",
        f"{two['step_ms']:.1f} ms; {one['step_ms']:.1f} ms",
        f"{100 * predictor['mape']:.1f} %",
    ]
    for figure in expected:
        assert any(said.startswith(figure) for said in table.values()), figure
